"""Tiny models of many of transformers' families, with random weights, and the whole way for each.

Sizes are the least that a family takes; what counts is how its layers are stored and called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import secateur as sc

IDS = 48
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": IDS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
BERT = SIZES | {"pad_token_id": 0}
LLAMA = SIZES | ENDS | {"num_key_value_heads": 1, "head_dim": 8}
OWN = {"vocab_size": IDS, "bos_token_id": 1, "eos_token_id": 2}
GPT = OWN | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
MIXED = LLAMA | {"num_experts_per_tok": 2}
LATENT = {k: x for k, x in MIXED.items() if k != "head_dim"} | {
    "num_key_value_heads": 2, "n_routed_experts": 4, "moe_intermediate_size": 16, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
STATES = OWN | {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}
T5 = {"vocab_size": IDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
      "pad_token_id": 0, "decoder_start_token_id": 0}  # fmt: skip
SPOKEN = ENDS | {
    "vocab_size": IDS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "decoder_start_token_id": 2,
}  # fmt: skip
BART = SPOKEN | {"max_position_embeddings": 64}
VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
       "image_size": 16, "patch_size": 4, "num_channels": 4}  # fmt: skip
WAVES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": IDS,
         "num_attention_heads": 2, "conv_dim": (8, 8), "conv_stride": (5, 2),
         "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A family: its kind, its class without the ending, that ending, its config and its inputs."""

    kind: str
    stem: str
    ending: str
    config: dict[str, Any]
    inputs: Callable[[torch.Generator], dict[str, Tensor]]


def ids(generator: torch.Generator, rows: int = 4, length: int = 12) -> Tensor:
    return torch.randint(4, IDS, (rows, length), generator=generator)


def text(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": ids(generator)}


def pairs(generator: torch.Generator) -> dict[str, Tensor]:
    return text(generator) | {"decoder_input_ids": ids(generator, length=9)}


def numbers(generator: torch.Generator, name: str, *shape: int) -> dict[str, Tensor]:
    return {name: torch.randn(shape, generator=generator)}


def spoken(generator: torch.Generator) -> dict[str, Tensor]:
    spectrum = numbers(generator, "input_features", 2, 8, 32)
    return spectrum | {"decoder_input_ids": ids(generator, 2, 9)}


def captioned(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": ids(generator, 2, 9)} | images(generator)


def shown(generator: torch.Generator) -> dict[str, Tensor]:
    """Texts that begin with the places of an image's patches."""
    patches = torch.full((2, 16), 3)
    return {"input_ids": torch.cat([patches, ids(generator, 2, 8)], 1)} | images(generator)


def _of(name: str, *shape: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    return lambda generator: numbers(generator, name, *shape)


images = _of("pixel_values", 2, 4, 16, 16)
large = _of("pixel_values", 2, 4, 32, 32)
waves = _of("input_values", 2, 400)


def _decoder(stem: str, **own: Any) -> Family:
    return Family("decoder", stem, "ForCausalLM", LLAMA | own, text)


def _mixture(stem: str, config: dict[str, Any] = MIXED, **own: Any) -> Family:
    return Family("mixture of experts", stem, "ForCausalLM", config | own, text)


def _states(stem: str, config: dict[str, Any], **own: Any) -> Family:
    return Family("state space, recurrent", stem, "ForCausalLM", config | own, text)


def _encoder(stem: str, config: dict[str, Any] = BERT, **own: Any) -> Family:
    return Family("encoder", stem, "Model", config | own, text)


def _translator(stem: str, config: dict[str, Any], ending: str = "") -> Family:
    return Family("encoder and decoder", stem, ending or "ForConditionalGeneration", config, pairs)


def _vision(stem: str, config: dict[str, Any] = VIT, inputs: Any = images) -> Family:
    return Family("vision", stem, "Model", config, inputs)


FAMILIES = (
    *map(_decoder, ["Llama", "Qwen2", "Qwen3", "Mistral", "Olmo2", "Granite", "SmolLM3", "Phi3",
                    "Glm4", "Cohere2", "Gemma2", "StableLm", "Starcoder2", "Nemotron", "Phi",
                    "Persimmon", "Helium", "Ernie4_5", "Apertus"]),
    Family("decoder", "GPT2", "LMHeadModel", GPT | {"n_inner": 32}, text),
    Family("decoder", "GPTJ", "ForCausalLM", GPT | {"rotary_dim": 4}, text),
    Family("decoder", "GPTNeoX", "ForCausalLM", SIZES | ENDS, text),
    Family("decoder", "OPT", "ForCausalLM", BERT | {"ffn_dim": 32, "word_embed_proj_dim": 16},
           text),
    Family("decoder", "Bloom", "ForCausalLM",
           OWN | {"hidden_size": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}, text),
    Family("decoder", "Falcon", "ForCausalLM", SIZES | ENDS, text),
    Family("decoder", "Mpt", "ForCausalLM",
           {"vocab_size": IDS, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64,
            "expansion_ratio": 2}, text),
    _mixture("Mixtral", num_local_experts=4),
    _mixture("Qwen2Moe", num_experts=4, moe_intermediate_size=16,
             shared_expert_intermediate_size=16),
    _mixture("Qwen3Moe", num_experts=4, moe_intermediate_size=16),
    _mixture("Olmoe", num_experts=4),
    _mixture("GraniteMoe", num_local_experts=4),
    _mixture("GptOss", num_local_experts=4, layer_types=["full_attention"] * 2),
    _mixture("DeepseekV2", LATENT),
    _mixture("DeepseekV3", LATENT),
    _mixture("Glm4Moe", n_routed_experts=4, moe_intermediate_size=16, n_group=1, topk_group=1,
             first_k_dense_replace=1),
    _mixture("JetMoe", LLAMA, num_key_value_heads=2, kv_channels=8, num_local_experts=4,
             num_experts_per_tok=2),
    _states("Mamba2", STATES, num_heads=4, head_dim=8, n_groups=1, chunk_size=8),
    _states("RecurrentGemma", SIZES | ENDS, num_hidden_layers=3, lru_width=16,
            attention_window_size=8),
    _states("Rwkv", OWN | {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2,
                           "intermediate_size": 32, "context_length": 64}),
    *map(_encoder, ["Bert", "Roberta", "MPNet", "DebertaV2", "FNet", "Nystromformer"]),
    _encoder("DistilBert", {"vocab_size": IDS, "dim": 16, "hidden_dim": 32, "n_layers": 2,
                            "n_heads": 2, "max_position_embeddings": 64}),
    _encoder("Electra", embedding_size=16),
    _encoder("Albert", embedding_size=8),
    _encoder("ModernBert", bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
             local_attention=8),
    _encoder("XLNet", {"vocab_size": IDS, "d_model": 16, "n_layer": 2, "n_head": 2,
                       "d_inner": 32}),
    _encoder("SqueezeBert", embedding_size=16),
    _translator("T5", T5),
    _translator("UMT5", T5),
    _translator("Bart", BART | {"forced_eos_token_id": None}),
    _translator("Pegasus", BART),
    _translator("M2M100", BART),
    _translator("Marian", BART, "MTModel"),
    Family("mixture of experts", "SwitchTransformers", "ForConditionalGeneration",
           T5 | {"num_experts": 4, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1,
                 "num_sparse_decoder_layers": 1}, pairs),
    *map(_vision, ["ViT", "DeiT", "Dinov2", "Beit", "CLIPVision", "SiglipVision"]),
    _vision("Swin", {"image_size": 16, "patch_size": 2, "num_channels": 4, "embed_dim": 8,
                     "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
    _vision("ConvNext", {"num_channels": 4, "num_stages": 2, "hidden_sizes": [8, 16],
                         "depths": [1, 1]}, large),
    _vision("ResNet", {"num_channels": 4, "embedding_size": 8, "hidden_sizes": [8, 16],
                       "depths": [1, 1], "layer_type": "basic"}, large),
    Family("speech", "Wav2Vec2", "Model", WAVES, waves),
    Family("speech", "Hubert", "Model", WAVES, waves),
    Family("speech", "Whisper", "ForConditionalGeneration",
           SPOKEN | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32,
                     "suppress_tokens": None, "begin_suppress_tokens": None},
           spoken),
    Family("speech", "AST", "Model",
           {k: x for k, x in VIT.items() if k not in ("image_size", "num_channels")}
           | {"max_length": 16, "num_mel_bins": 8, "frequency_stride": 4, "time_stride": 4},
           _of("input_values", 2, 16, 8)),
    Family("text and images", "CLIP", "Model",
           {"text_config": BERT | {"bos_token_id": 1, "eos_token_id": 2, "projection_dim": 8},
            "vision_config": VIT, "projection_dim": 8}, captioned),
    Family("text and images", "Siglip", "Model",
           {"text_config": BERT | {"projection_size": 16}, "vision_config": VIT}, captioned),
    Family("text and images", "Llava", "ForConditionalGeneration",
           {"text_config": LLAMA | {"model_type": "llama"}, "image_token_index": 3,
            "vision_config": VIT | {"model_type": "clip_vision_model"},
            "vision_feature_layer": -1}, shown),
)  # fmt: skip


def model_of(family: Family) -> nn.Module:
    """The family's model in eval mode."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family.stem}Config")(**family.config)
    model: nn.Module = getattr(transformers, family.stem + family.ending)(config).eval()
    return model


def whole_way(family: Family, folder: Path) -> sc.Plan:
    """The plan, once the model has been reconstructed by it, checked, saved and loaded twice.

    Raises:
        ValueError: if a verb does, or a loaded model has other outputs than the saved one.
    """
    model, generator = model_of(family), torch.Generator().manual_seed(0)
    batches = [family.inputs(generator) for _ in range(3)]
    plan = sc.plan(model, "2:4@pad-remainder")
    report = sc.reconstruct_(model, plan, sc.sparsegpt, batches)
    sc.check(model, plan)
    sc.save(model, folder, plan=plan, reports=[report])
    expected = _outputs(model, batches[0])
    for loaded in (sc.load(folder), type(model).from_pretrained(folder)):  # type: ignore[attr-defined]
        found = _outputs(loaded.eval(), batches[0])
        if len(found) != len(expected) or not all(map(torch.equal, found, expected)):
            raise ValueError(f"{family.stem}: a loaded model has other outputs")
        sc.check(loaded, plan)
    return plan


@torch.no_grad()
def _outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    return [x for x in pytree.tree_leaves(dict(model(**batch))) if isinstance(x, Tensor)]
