"""`secateur recover`: learning while every zero holds."""

import json
from pathlib import Path

import torch

from secateur.files.sidecar import read_sidecar
from secateur.integrations.tokens import sampled_rows, token_rows
from secateur.integrations.transformers import load_folder
from secateur.train import WithTask, distil_
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


def test_recover_trains_on_rows_that_the_dense_model_writes_and_on_the_text_itself(
    dense: Path, pruned: Path, encoder: Path, tmp_path: Path
) -> None:
    def found(*more: object) -> dict[str, float]:
        out = tmp_path / "-".join(map(str, ("out", *more)))
        arguments = (
            "--tokens", tokens(dense, "calibration"), "--rows", 4, "--batch", 4, "--steps", 6,
            "--learning-rate", 0.003, "--json",
        )  # fmt: skip
        said(run("recover", pruned, "--teacher", dense, "-o", out, *arguments, *more))
        return weights(out)

    student, teacher = (load_folder(folder).float() for folder in (pruned, dense))
    (rows,) = token_rows(tokens(dense, "calibration"), 4, 4)
    written = sampled_rows(teacher, [rows], 4)
    assert len(written) == 1
    distil_(
        student, teacher, [rows, *written], steps=6, learning_rate=0.003, loss=WithTask(0.25)
    )  # fmt: skip
    both = found("--sample", 4, "--task-share", 0.25)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(both[name], student.state_dict()[name].bfloat16())
    for other in (found(), found("--sample", 4), found("--task-share", 0.25)):
        assert not torch.equal(other[name], both[name])
    line = refused(run("recover", encoder, "--teacher", encoder, "-o", tmp_path / "x", "--tokens",
                       tokens(encoder, "rows"), "--task-share", 0.3))  # fmt: skip
    assert "--task-share 0.3 needs a model that predicts the next token, BertModel does not" in line
