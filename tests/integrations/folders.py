"""Tiny folders of transformers' models, with a tokenizer of one word a token."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[UNK]", "[END]", "a", "b", "c", "d"]


def tiny(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of two layers."""
    sizes = {
        "vocab_size": 16,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    torch.manual_seed(0)
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**sizes)).to(dtype).eval()
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=True)
    config.dtype = dtype
    return transformers.LlamaForCausalLM._from_config(config).to(dtype).eval()


def make_folder(path: Path, kind: str, **config: Any) -> Path:
    tiny(kind).save_pretrained(path)
    change_config(path, **config)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(3)  # as sentence encoders' files have it: must not cut our rows
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
