"""`secateur accelerate`: what is faster packed is written so, and nothing where nothing is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.accelerate.report import AccelerateReport
from secateur.cli import choices
from secateur.files.sidecar import read_sidecar
from tests.cli.shell import refused, run, said, weights

FASTER = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Two layers are faster in semi24, whatever is measured; what `accelerate_` was told."""
    real, told = choices.accelerate_, list[tuple[Any, ...]]()

    def chosen(model: nn.Module, *arguments: Any, remeasure: bool) -> AccelerateReport:
        told.append((*arguments, remeasure))
        report = real(model, *arguments, remeasure=remeasure)
        sc.pack_(model, "semi24", FASTER)
        table = (("reference", None),)
        layers = tuple(
            replace(one, format="semi24", table=table) if one.layer in FASTER else one
            for one in report.layers
        )
        return replace(report, layers=layers)

    monkeypatch.setattr(choices, "accelerate_", chosen)
    return told


OPTIONS = ("--tokens-per-call", "1:5,4:1", "--layers", "*.0.mlp.up_proj", "--layers", "*.down_proj")


def test_what_is_faster_is_written_packed(
    pruned: Path, tmp_path: Path, faster: list[tuple[Any, ...]]
) -> None:
    out = tmp_path / "fast"
    text = said(run("accelerate", pruned, "-o", out, *OPTIONS, "--formats", "semi24"))
    assert f"written to {out}: " in text and "measured on cpu" in text
    (told,) = faster
    assert told[:2] == ({1: 5.0, 4: 1.0}, ["semi24"]) and told[3:] == (False, "memory", True)
    assert told[2] == [FASTER[0], "model.layers.0.mlp.down_proj", FASTER[1]]
    packed = read_sidecar(out).packed
    assert {name: entry["format"] for name, entry in packed.items()} == dict.fromkeys(
        FASTER, "semi24"
    )
    assert read_sidecar(out).plan == read_sidecar(pruned).plan
    before, model = weights(pruned), sc.load(out)
    for name in FASTER:
        assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"])
    assert said(run("check", out))


def test_json_has_the_sizes_and_the_choice(
    pruned: Path, tmp_path: Path, faster: list[tuple[Any, ...]]
) -> None:
    out = tmp_path / "fast"
    found = json.loads(said(run("accelerate", pruned, "-o", out, *OPTIONS, "--json")))
    assert found["output"] == str(out) and found["bytes"][0] > found["bytes"][1] > 0
    assert [layer["format"] for layer in found["layers"]].count("semi24") == 2


def test_where_nothing_is_faster_nothing_is_written(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "fast"
    line = refused(run("accelerate", pruned, "-o", out, "--layers", "*.down_proj"))
    assert "is not written: none of 2 layers is faster packed on cpu" in line
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("")
    line = refused(run("accelerate", pruned, "-o", out))
    assert "--output needs an empty or a new folder" in line
