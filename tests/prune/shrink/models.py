"""Tiny language models of transformers for what removes parts of them, with random weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MIXED = SIZES | {"num_experts_per_tok": 2, "head_dim": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SIZES | {"head_dim": 4},
    "Qwen2": SIZES,
    "Qwen3": SIZES | {"head_dim": 4},
    "Gemma2": SIZES | {"head_dim": 4},
    "Gemma3": SIZES | {"head_dim": 4},
    "Phi3": SIZES,
    "OPT": {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "GPT2": {"vocab_size": 32, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32,
             "bos_token_id": 1, "eos_token_id": 2},
    "Mixtral": MIXED | {"num_local_experts": 4},
    "Qwen3Moe": MIXED | {"num_experts": 4, "moe_intermediate_size": 12},
    "Olmoe": {k: v for k, v in MIXED.items() if k != "head_dim"} | {"num_experts": 4},
    "GraniteMoe": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": MIXED | {"num_local_experts": 4, "layer_types": ["full_attention"] * 3},
    "DeepseekV3": SIZES | {"num_key_value_heads": 8, "n_routed_experts": 8, "n_group": 2,
                           "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
                           "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
                           "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4},
}  # fmt: skip
CLASSES = {"GPT2": "GPT2LMHeadModel"}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def language_model(family: str, **own: Any) -> Any:
    """A model of the family with every parameter at random, in eval mode."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**FAMILIES[family] | own)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 4 + (parameter.dim() == 1))
    return model.eval()


def rows(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 32, (8, 11), generator=generator) for _ in range(count)]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(rows(1)[0]).logits
    return found


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
