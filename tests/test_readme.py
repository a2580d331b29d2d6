"""The README and CONTRIBUTING keep their word: commands run as written, trees and paths exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from secateur.cli import app

ROOT = Path(__file__).parents[1]
WORDS = [f"w{i}" for i in range(500)]
TEXT_BYTES = 100_000


def commands() -> list[list[str]]:
    """Every `secateur` command in the README's shell blocks, in order, split as a shell does."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    found = [part for line in lines for part in line.partition("#")[0].split("&&")]
    return [words[1:] for part in found if (words := shlex.split(part))[:1] == ["secateur"]]


def language_model(folder: Path) -> None:
    """A Llama of two blocks with layers of 64 x 64 tiles, a tokenizer, and 1024 positions."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{word: i + 3 for i, word in enumerate(WORDS)}}
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1024,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def text(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = [
        WORDS[int(i)] for i in torch.randint(len(WORDS), (TEXT_BYTES // 4,), generator=generator)
    ]
    path.write_text(" ".join(words)[:TEXT_BYTES])


def test_the_commands_of_the_readme_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model(tmp_path / "model")
    text(tmp_path / "calib.txt", 1)
    text(tmp_path / "valid.txt", 2)
    monkeypatch.chdir(tmp_path)
    said: dict[str, str] = {}
    for arguments in commands():
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{arguments}\n{result.output}"
        said[arguments[0]] = result.output
    assert list(said)[:5] == ["inspect", "prune", "check", "eval", "bench"]
    weight = load_file("model-24/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert bool(((weight.view(-1, 4) == 0).sum(1) == 2).all())
    told = " ".join(said["prune"].split())
    # 100 kB are about 21,000 words, 20 rows of 1024 where 128 are the default
    assert re.search(
        r"--rows 128: there are only (\d\d) rows of 1,024 tokens, which are used", told
    )
    assert "a smaller --length" in told
    if "the model is unchanged" in said["bench"]:
        advice = said["bench"].strip().splitlines()[-1]
        assert "faster here" in advice and "block:64x64@0.8" in advice


TREE = re.compile(r"^    ([a-z_]+)/ +\S", re.MULTILINE)
ROW = re.compile(r"^\|[^|]*\| `([a-z_]+)` \| \S", re.MULTILINE)


def test_the_tree_of_the_readme_is_the_folders_that_there_are() -> None:
    """In the order of DESIGN.md's table, so that a room stands above what it imports."""
    readme, design = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "DESIGN.md")
    )
    (tree,) = re.findall(r"^```text\nsecateur/\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    folders = {path.parent.name for path in (ROOT / "secateur").glob("*/__init__.py")}
    named = TREE.findall(tree)
    assert len(named) == len(tree.splitlines()) and set(named) == folders
    assert named == ROW.findall(design)


def test_every_path_of_the_table_of_additions_exists() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| to add \|.*\n\|---.*\n((?:\|.*\n)+)", contributing, re.MULTILINE)
    kinds = {line.split("|")[1].strip() for line in table.splitlines()}
    assert {"a criterion", "a pattern", "a statistic", "an algorithm", "a grid"} <= kinds
    assert {"a format", "an implementation", "a GPU kernel", "a CLI verb"} <= kinds
    assert {"an integration", "a schedule", "a bench"} <= kinds
    paths = re.findall(r"`((?:secateur|tests|bench|docs)/[^`]*)`", table)
    assert len(paths) > 25
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert all(line.count("`secateur/") + line.count("`bench/") for line in table.splitlines())


def test_the_design_stays_short() -> None:
    """README, DESIGN and a listing are short enough to read at once and say where everything is."""
    assert len((ROOT / "DESIGN.md").read_text(encoding="utf-8").splitlines()) <= 250
