"""Tiny language models of several families, with random weights."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, POSITIONS = 48, 64
BOS, END, PAD = 1, 2, 0
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": POSITIONS,
    "initializer_range": 0.5, "bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD,
    "tie_word_embeddings": False,  # tied, random weights would repeat what they read
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SIZES,
    "Qwen2": SIZES,
    "Qwen3": SIZES | {"head_dim": 8},
    "Mistral": SIZES | {"sliding_window": 6},
    "Gemma2": SIZES | {"head_dim": 8, "sliding_window": 6},
    "Phi3": SIZES,
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS, "n_inner": 32}
    | {
        n: SIZES[n]
        for n in (
            "vocab_size",
            "initializer_range",
            "bos_token_id",
            "eos_token_id",
            "tie_word_embeddings",
        )
    },
    "OPT": {n: x for n, x in SIZES.items() if n not in ("intermediate_size", "initializer_range")}
    | {"ffn_dim": 32, "word_embed_proj_dim": 16, "init_std": 0.5},
}
HEADS = {"GPT2": "GPT2LMHeadModel"}


@cache
def language_model(family: str = "Llama") -> nn.Module:
    """The family's causal language model, in eval mode; tests leave it as it is."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    name = HEADS.get(family, f"{family}ForCausalLM")
    model: nn.Module = getattr(transformers, name)(config).eval()
    return model


def prompts(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def left_padded(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of these lengths, padded on the left, and their mask."""
    ids = prompts(len(lengths), max(lengths), seed)
    before = torch.arange(max(lengths)) < (max(lengths) - torch.tensor(lengths))[:, None]
    return ids.masked_fill(before, PAD), (~before).long()
