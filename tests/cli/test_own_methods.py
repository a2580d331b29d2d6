"""A method in a file: run only if trusted, with the options, statistics and errors of others."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import secateur as sc
from secateur.cli.methods import find_criterion, find_method
from secateur.integrations.transformers import load_folder
from tests.cli.shell import ROWS, refused, run, said, same_tensors, tokens, weights

OWN = """
from dataclasses import dataclass

import secateur as sc
from secateur import wanda
from secateur.reconstruct import Solution

@dataclass
class Kept:
    share: "float"

def energy(weight, input_norm, *, power: float = 2.0):
    return weight.abs() ** power * input_norm

def halves(weight, pattern):
    mask = pattern.mask(weight.abs())
    return Solution(weight.masked_fill(~mask, 0) * 0.5, mask)

def listed(weight):
    return [1.0]

def nothing(weight, pattern):
    return weight

def curved(weight, hessian):
    return weight
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


def test_a_criterion_in_a_file_prunes_as_the_function_does(
    dense: Path, own: Path, tmp_path: Path
) -> None:
    data = ("--tokens", tokens(dense, "calibration"), "--rows", ROWS)
    asked = ("prune", dense, "-p", "2:4", "-m", f"{own}:energy", "--trust-code", *data)
    text = said(run(*asked, "-o", tmp_path / "one", "--option", "power=1"))
    digest = hashlib.sha256(own.read_bytes()).hexdigest()[:8]
    assert f"method own.py:energy@{digest}(power=1.0) /" in text
    said(run("prune", dense, "-p", "2:4", "-m", "wanda", *data, "-o", tmp_path / "two"))
    assert same_tensors(weights(tmp_path / "one"), weights(tmp_path / "two"))
    said(run(*asked, "-o", tmp_path / "three"))
    assert not same_tensors(weights(tmp_path / "one"), weights(tmp_path / "three"))
    report = json.loads((tmp_path / "three" / "secateur.json").read_text())["reports"][0]
    assert report["method"] == f"own.py:energy@{digest}"


def test_an_algorithm_in_a_file_refits(dense: Path, own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said(run("prune", dense, "-p", "2:4", "-m", f"{own}:halves", "--trust-code", "-o", out))
    before, after = (load_folder(folder).state_dict() for folder in (dense, out))
    name = "model.layers.0.mlp.up_proj.weight"
    kept = after[name] != 0
    assert torch.equal(after[name][kept], before[name][kept] * 0.5)
    data = ("--tokens", tokens(dense, "calibration"), "--rows", 1)
    said(run("stream", dense, "-p", "2:4", "-m", f"{own}:halves", "--trust-code", *data, "-o",
             tmp_path / "streamed"))  # fmt: skip
    assert same_tensors(dict(load_folder(tmp_path / "streamed").state_dict()), dict(after))


def test_it_stands_wherever_a_method_does(dense: Path, own: Path, tmp_path: Path) -> None:
    method = find_method(f"refit({own}:energy)", ["damping=0.1"], trust_code=True)
    assert method.refits and sorted(method.needs) == ["gram", "input_norm"]
    assert find_method(f"blockwise(swap({own}:energy))", trust_code=True).refits
    # what the file imports keeps its name
    assert find_method(f"{own}:wanda", trust_code=True).function is sc.wanda
    assert sc.wanda.__name__ == "wanda"
    assert find_criterion(f"{own}:energy", trust_code=True).needs == ("input_norm",)
    data = ("--tokens", tokens(dense, "validation"), "--rows", 1)
    curves = tmp_path / "sense.json"
    said(
        run(
            "sensitivity", dense, "-m", f"{own}:energy", "--trust-code", *data, "-p", "2:4",
            "--layers", "*.1.mlp.up_proj", "-o", curves,
        )
    )  # fmt: skip
    assert json.loads(curves.read_text())["criterion"].startswith("own.py:energy@")


def test_a_file_that_is_not_trusted_is_not_run(dense: Path, tmp_path: Path) -> None:
    file, mark = tmp_path / "own.py", tmp_path / "ran"
    file.write_text(
        f"import os\nos.mkdir({str(mark)!r})\ndef score(weight):\n    return weight.abs()\n"
    )
    for method in (f"{file}:score", f"refit({file}:score)"):
        line = refused(run("prune", dense, "-o", tmp_path / "out", "-p", "2:4", "-m", method))
        assert f"runs the code in {file}: give --trust-code if you trust it" in line
    assert not mark.exists() and not (tmp_path / "out").exists()
    followed = ("prune", dense, "-o", tmp_path / "out", "-p", "2:4", "-m", f"{file}:score")
    said(run(*followed, "--trust-code"))
    assert mark.exists()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("none.py:score", "--method none.py:score: there is no file none.py"),
        ("{own}:energi", "has no function 'energi', it has wanda, energy, halves, listed, nothing, "
         "curved: did you mean 'energy'?"),
        ("{own}", "has no function '', it has wanda, energy, halves, listed, nothing, curved: write"
         " {own}:FUNCTION"),
        ("{own}:curved", "asks for 'hessian', which is no statistic: its parameters may be named "
         "weight, layer_seed, input_norm"),
        ("{own}:listed", "needs to give a tensor of scores, got list"),
        ("refit({own}:none)", "{own} has no function 'none'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_it_is_one_line(
    dense: Path, own: Path, tmp_path: Path, method: str, expected: str
) -> None:
    named = method.format(own=own)
    line = refused(
        run("prune", dense, "-o", tmp_path / "out", "-p", "2:4", "-m", named, "--trust-code")
    )
    assert expected.format(own=own) in line


def test_an_algorithm_that_gives_something_else_is_told(
    dense: Path, own: Path, tmp_path: Path
) -> None:
    data = ("--tokens", tokens(dense, "calibration"), "--rows", 1)
    asked = ("prune", dense, "-p", "2:4", "-m", f"{own}:nothing", "--trust-code")
    assert "needs to give a Solution, got Tensor" in refused(run(*asked, "-o", tmp_path / "out"))
    line = refused(run("sensitivity", dense, "-m", f"{own}:halves", "--trust-code", *data))
    assert "refits the kept weights" in line


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 1\ndef score(weight:\n", "line 2: SyntaxError: "),
        ("\n\nimport no_such_module\n", "line 3: ModuleNotFoundError: No module named 'no_such_mo"),
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
        ("def f():\n    raise KeyError('a')\nf()\n", "line 2: KeyError: 'a'"),
    ],
)
def test_a_file_that_cannot_be_run_is_one_line(
    dense: Path, tmp_path: Path, code: str, expected: str
) -> None:
    file = tmp_path / "own.py"
    file.write_text(code)
    asked = ("prune", dense, "-o", tmp_path / "out", "-p", "2:4", "-m", f"{file}:score")
    assert f"{file} cannot be run, {expected}" in refused(run(*asked, "--trust-code"))
