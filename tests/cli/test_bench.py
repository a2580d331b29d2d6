"""`secateur bench`: what runs, and why."""

import json
from pathlib import Path

import pytest

from secateur.accelerate.tokens import Tokens
from secateur.cli.options import token_counts
from tests.cli.shell import refused, run, said


def test_bench_says_what_runs_and_why(pruned: Path) -> None:
    command = (
        "bench",
        pruned,
        "--tokens-per-call",
        "4,1",
        "--layers",
        "model.layers.0.mlp.up_proj",
    )
    found = json.loads(said(run(*command, "--json")))
    assert found["tokens"] == [1, 4]
    (layer,) = found["layers"]
    assert layer["layer"] == "model.layers.0.mlp.up_proj" and layer["shape"] == [64, 32]
    text = said(run(*command))
    assert "measured on cpu" in text and layer["reason"].split(":")[0][:20] in text
    assert "what would be faster here" in text or "would not be faster here either" in text
    (heads,) = [line for line in text.splitlines() if line.strip().startswith("layer ")]
    assert heads.split() == "layer tokens runs eager us prepacked us sparse us".split()
    assert "vs prepacked" in said(run(*command, "--full"))
    line = refused(run("bench", pruned, "--tokens-per-call", "1,x"))
    assert "needs numbers of at least 1 separated by commas, or each with how often" in line


def test_a_day_is_an_option_and_so_is_the_policy(pruned: Path) -> None:
    command = ("bench", pruned, "--layers", "model.layers.0.mlp.up_proj", "--json")
    found = json.loads(
        said(run(*command, "--tokens-per-call", "4:1,1:1000", "--policy", "fastest"))
    )
    assert (found["tokens"], found["often"], found["policy"]) == ([1, 4], [1000.0, 1.0], "fastest")
    line = refused(run(*command, "--tokens-per-call", "1:0"))
    assert "--tokens-per-call needs to know how often 1 tokens occur, a finite number" in line
    assert line.endswith("give the others as in 1:1000,2048:1")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1", (1,)), ("1, 16,128", (1, 16, 128)), ("1:1000, 2048:0.5", {1: 1000.0, 2048: 0.5})],
)
def test_numbers_of_tokens_are_read(text: str, tokens: Tokens) -> None:
    assert token_counts(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "1,x", "1.5", "1:x", "1:2:3", "1:3,2", "2,1:3", "1:2,1:3", ":3"]
)
def test_what_are_no_numbers_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--tokens-per-call needs numbers of at least 1 separated"):
        token_counts(text)


@pytest.mark.parametrize("text", ["0", "-1", "1:0", "1:-1", "1:nan", "1:inf", "0:1"])
def test_numbers_that_cannot_be_are_refused_before_a_model_is_read(text: str) -> None:
    with pytest.raises(ValueError, match="accelerate_ needs"):
        token_counts(text)
