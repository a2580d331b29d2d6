"""The bench of an image encoder, end to end as a toy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.lib.configurations import EVERYTHING, MLP, named
from bench.run import vision, vit
from tests.bench.rows import rows_of

pytestmark = pytest.mark.usefixtures("no_cpu_kernels")

pytest.importorskip("transformers")


pytest.importorskip("sklearn")


ROOT = Path(__file__).parents[3]


def test_the_encoder_runs_every_configuration(tmp_path: Path) -> None:
    words = ["--tiny", "--batch", "2", "--rounds", "2", "--output", str(tmp_path)]
    # in a process of its own: the tests' checks of shapes cannot be traced as one graph
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "bench.run.vit", *words],
        cwd=ROOT,
        env={**os.environ, "SECATEUR_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["configuration"]: row for row in rows_of(tmp_path, "vit")}
    assert list(rows) == list(vit.CONFIGURATIONS)
    for row in rows.values():
        assert (row["model"], row["batch"], row["rounds"], row["note"]) == ("tiny", "2", "2", "")
        assert float(row["img_s"]) == pytest.approx(2e3 / float(row["ms"]), 1e-3)
        assert float(row["compile_s"]) > 0 and row["commit"] and row["command"]
        assert sum(int(part.split()[0]) for part in row["runs"].split("; ")) == 8
        assert float(row["error"]) < 0.02
    assert rows["dense"]["runs"] == "8 dense" and float(rows["dense"]["error"]) == 0
    assert float(rows["int8 dynamic"]["error"]) > 1e-3
    name = "int8 dynamic attention, int8 dynamic 2:4 lin1, 2:4 lin2"
    if not torch.cuda.is_available():
        assert rows[name]["runs"] == (
            "4 int8_dynamic reference; 2 semi24_int8_dynamic reference; 2 semi24 reference"
        )


def test_the_encoder_is_vit_h_with_weights_that_matter() -> None:
    assert vit.VIT_H.tokens(32) == (32 * 64 * 64, 32 * 70 * 70)
    encoder = vit.Encoder(vit.TINY, torch.device("cpu"))
    again = vit.Encoder(vit.TINY, torch.device("cpu"))
    for (name, one), other in zip(encoder.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other) and one.dtype == torch.bfloat16
        mean = 1.0 if name.endswith("weight") and one.dim() == 1 else 0.0
        assert float(one.detach().float().mean()) == pytest.approx(mean, abs=0.02), name
        assert float(one.detach().float().std()) == pytest.approx(vit.STD, rel=0.5), name
    assert len(named(encoder, EVERYTHING)) == 8 and len(named(encoder, MLP)) == 4


def test_windows_and_global_attention_see_the_tokens_that_are_measured() -> None:
    encoder, seen = vit.Encoder(vit.TINY, torch.device("cpu")), set[int]()
    for name in named(encoder, EVERYTHING):
        encoder.get_submodule(name).register_forward_pre_hook(
            lambda _, args: seen.add(args[0].numel() // args[0].shape[-1])
        )
    with torch.no_grad():
        encoder(vit.images(vit.TINY, 3, torch.device("cpu")))
    assert seen == set(vit.TINY.tokens(3))


def test_a_failure_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("out of something\nand more")

    monkeypatch.setattr(vit, "pack", fails)
    found = vit.row("dense", vit.TINY, 1, torch.device("cpu"), 2)
    assert found["note"] == "RuntimeError: out of something" and found["img_s"] == ""
    assert set(vit.MEASURED) < set(found)


def test_rows_beyond_the_time_budget_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tiny", "--batch", "1", "--time-budget", "-1", "--configurations", "dense"]
    assert vit.main([*words, "--output", str(tmp_path)]) == 1
    assert "left out: dense, batch 1\n" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("bench", [vit, vision])
def test_a_missing_package_is_said(
    bench: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert bench.main(["--tiny", "--output", str(tmp_path)]) == 2
    assert f"{bench.__name__} needs" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_vit_h_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        vit.main([])
    assert "ViT-h needs a CUDA GPU" in capsys.readouterr().err
