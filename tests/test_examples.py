"""Each example runs on its own and prints what its docstring promises."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
MOST_LINES = 80


def last_line(name: str) -> dict[str, float]:
    """The numbers of the `name=value` line that an example ends with."""
    # One thread: on a busy machine more of them wait for one another and take ten times as long.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    words = finished.stdout.splitlines()[-1].split()
    return {key: float(value) for key, value in (word.split("=") for word in words)}


def test_prune_mlp_shows_that_a_criterion_matters() -> None:
    accuracy = last_line("prune_mlp.py")
    assert accuracy["dense"] > 0.95
    assert accuracy["dense"] > accuracy["wanda"] > accuracy["magnitude"] > accuracy["random"]


def test_reconstruct_transformer_shows_that_refitting_pays() -> None:
    perplexity = last_line("reconstruct_transformer.py")
    assert perplexity["dense"] < 15, "the model has learnt something: 256 would be a guess"
    assert perplexity["dense"] < perplexity["sparsegpt"]
    assert perplexity["sparsegpt"] < min(perplexity["wanda"], perplexity["magnitude"])


def test_train_with_hold_shows_that_retraining_recovers() -> None:
    accuracy = last_line("train_with_hold.py")
    assert accuracy["pruned"] < accuracy["dense"] - 0.03
    for road in ("retrained", "gradual"):
        assert accuracy[road] > accuracy["dense"] - 0.01, road


def test_own_criterion_agrees_with_the_library_where_it_should() -> None:
    error = last_line("own_criterion.py")
    assert error["softened_1.0"] == error["wanda"], "power 1 is Wanda"
    assert error["softened_0.5"] < error["magnitude"]


def test_accelerate_blocks_changes_no_output() -> None:
    result = last_line("accelerate_blocks.py")
    assert result["sparse"] + result["dense"] == 3, "no layer is lost, whichever won"
    assert result["dense"] >= 1, "the layer without zeros stays dense"
    assert result["largest_difference"] < 1e-5


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_tested_and_says_what_it_shows(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < MOST_LINES
    assert ast.get_docstring(ast.parse(source))
    assert f'"{path.name}"' in Path(__file__).read_text(encoding="utf-8")
