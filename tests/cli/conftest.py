"""Tiny models on disk for the commands."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.shell import LENGTH, ROWS, WIDTH, WORDS, run, said


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-block Llama in bfloat16 with tied embeddings, a tokenizer and token rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "dense"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{word: i + 3 for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    draw = partial(torch.randint, 3, 93, (ROWS, LENGTH), dtype=torch.int16)
    save_file({"calibration": draw(), "validation": draw()}, folder / "tokens.safetensors")
    (folder / "text.txt").write_text(" ".join(WORDS * 4))
    return folder


@pytest.fixture(scope="session")
def pruned(dense: Path) -> Path:
    """The model pruned to 2:4 by the command line."""
    folder = dense.with_name("pruned")
    said(run("prune", dense, "-o", folder, "-p", "2:4"))
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer BertModel without a head."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "encoder"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokens = torch.randint(3, 93, (ROWS, LENGTH), dtype=torch.int16)
    save_file({"rows": tokens}, folder / "tokens.safetensors")
    return folder


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    draw = torch.randn
    tensors = {
        "embed.weight": draw(20, 16), "blocks.0.type.weight": draw(8, 16),
        "blocks.0.type.bias": draw(8), "blocks.0.norm.weight": draw(16),
        "stem.weight": draw(8, 8, 3, 3), "dw.weight": draw(8, 1, 3, 3),
        "gpt.a.c_fc.weight": draw(16, 32), "gpt.a.c_fc.bias": draw(32),
        "gpt.b.c_fc.weight": draw(16, 16), "ids.weight": torch.ones(4, 4, dtype=torch.int8),
        "lm_head.weight": draw(20, 16), "step": torch.tensor(7),
    }  # fmt: skip
    save_file(tensors, tmp_path / "weights.safetensors", {"format": "pt", "made": "by hand"})
    return tmp_path / "weights.safetensors"
