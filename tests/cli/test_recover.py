"""`secateur recover`: learning while every zero holds."""

import json
from pathlib import Path

import torch

from secateur.files.sidecar import read_sidecar
from tests.cli.shell import ROWS, refused, run, said, tokens, weights


def test_recover_learns_while_every_zero_holds(dense: Path, pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "recovered"
    found = json.loads(
        said(
            run(
                "recover", pruned, "--teacher", dense, "-o", out, "--tokens",
                tokens(dense, "calibration"), "--rows", ROWS, "--batch", 4, "--steps", 20,
                "--learning-rate", 0.003, "--eval-tokens", tokens(dense, "calibration"),
                "--eval-rows", ROWS, "--json",
            )
        )
    )  # fmt: skip
    assert found["report"]["steps"] == 20
    assert found["after"]["KL to dense"] < 0.8 * found["before"]["KL to dense"]
    before, after = weights(pruned), weights(out)
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.bfloat16 and not torch.equal(before[name], after[name])
    assert torch.equal(before[name] == 0, after[name] == 0)
    assert said(run("check", out))
    assert [set(report) >= {"steps"} for report in read_sidecar(out).reports] == [False, True]
    line = refused(run("recover", dense, "--teacher", dense, "-o", tmp_path / "x", "--tokens",
                       tokens(dense, "calibration"), "--rows", 2))  # fmt: skip
    assert "hold needs a model with zeros" in line
