"""A small Llama with an adapter of each of PEFT's methods, all of whose numbers are random."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import LlamaConfig, LlamaForCausalLM

CONFIGS = {kind.name: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
METHODS = sorted(CONFIGS)

COMMON: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "down_proj"],
    "num_virtual_tokens": 4,
}
OWN: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "target_modules": None},
    "BEFT": {"target_modules": ["v_proj"]},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "CPT": {"cpt_token_ids": [1, 2, 3, 4], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
    "OFT": {"oft_block_size": 4},
    "PEANUT": {"r": 4},
    "PREFIX_TUNING": {"prefix_projection": True, "encoder_hidden_size": 8},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [0, 1]},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 10},
    "XLORA": {"hidden_size": 16, "target_modules": None},
}


def llama(dtype: torch.dtype = torch.float32) -> Any:
    """A random Llama of two layers whose linear layers are 16 wide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32},
        **{"bos_token_id": None, "eos_token_id": None, "use_cache": False},
    )
    config.dtype = dtype
    return LlamaForCausalLM._from_config(config).eval()


def around(model: Any, config: Any) -> Any:
    """The model inside PEFT's wrapper; what PEFT asks of transformers is deprecated there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def with_adapter(model: Any, method: str, folder: Path) -> Any:
    """The model inside PEFT's wrapper, every number of the adapter drawn at random."""
    options = {**COMMON, **OWN.get(method, {})}
    if method == "XLORA":
        target = {"r": 2, "target_modules": COMMON["target_modules"]}
        around(llama(), peft.LoraConfig(**target)).save_pretrained(folder)
        options["adapters"] = {"one": str(folder)}
    config = CONFIGS[method]
    known = inspect.signature(config).parameters
    own = {id(parameter) for parameter in model.parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of methods that are deprecated
        chosen = config(**{k: v for k, v in options.items() if k in known and v is not None})
    made = around(model, chosen)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        if id(parameter) not in own and parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise.to(parameter.dtype)
    return made.eval()
