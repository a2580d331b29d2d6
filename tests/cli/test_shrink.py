"""`secateur shrink`: a smaller folder that transformers loads."""

import json
from pathlib import Path

import torch
import transformers

from secateur.files.sidecar import read_sidecar
from tests.cli.shell import ROWS, refused, run, said, tokens


def test_shrink_writes_a_smaller_folder_that_transformers_loads(
    dense: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    data = ("--tokens", tokens(dense, "calibration"), "--rows", ROWS, "--batch", 4)
    found = json.loads(
        said(
            run(
                "shrink", dense, "-o", out, "--width", 0.5, "--blocks", 0.5, *data,
                "--eval-tokens", tokens(dense, "calibration"), "--eval-rows", ROWS, "--json",
            )
        )
    )  # fmt: skip
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (dense, out))
    assert new["intermediate_size"] == old["intermediate_size"] // 2
    assert new["num_hidden_layers"] == old["num_hidden_layers"] // 2
    report = found["report"]
    assert report["parameters"] < report["parameters_before"]
    assert set(found["before"]) == {"perplexity"} != found["after"]
    assert [set(r) >= {"flops_before", "flops"} for r in read_sidecar(out).reports] == [True]
    stock = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert stock.num_parameters() == report["parameters"]
    assert stock.dtype == torch.bfloat16
    shown = said(run("eval", out, "--tokens", tokens(dense, "calibration"), "--rows", ROWS))
    assert "perplexity" in shown


def test_what_is_asked_for_is_checked_first(dense: Path, tmp_path: Path) -> None:
    data = ("--tokens", tokens(dense, "calibration"), "--rows", 2)
    line = refused(run("shrink", dense, "-o", tmp_path / "x", *data))
    assert "one of --width, --heads, --experts and --blocks is needed, as --width 0.25" in line
    line = refused(run("shrink", dense, "-o", tmp_path / "x", "--experts", 0.5, *data))
    assert "has no experts that transformers keeps in stacks: leave --experts at 0" in line
    line = refused(run("shrink", dense, "-o", tmp_path / "x", "--width", 0.5, "-m", "alps", *data))
    assert "this needs a criterion, 'alps' refits the kept weights" in line
    assert not (tmp_path / "x").exists()
