"""The vision benches: both run end to end as toys, and their tables keep what loses or fails."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import tables, vision, vit

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]


def rows_of(folder: Path, bench: str) -> list[dict[str, str]]:
    (path,) = folder.glob(f"{bench}_*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_encoder_runs_every_configuration(tmp_path: Path) -> None:
    words = ["--tiny", "--batch", "2", "--rounds", "2", "--output", str(tmp_path)]
    # in a process of its own: the tests' checks of shapes cannot be traced as one graph
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "bench.vit", *words],
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
    assert len(vit.named(encoder, vit.EVERYTHING)) == 8 and len(vit.named(encoder, vit.MLP)) == 4


def test_windows_and_global_attention_see_the_tokens_that_are_measured() -> None:
    encoder, seen = vit.Encoder(vit.TINY, torch.device("cpu")), set[int]()
    for name in vit.named(encoder, vit.EVERYTHING):
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


def test_the_transformer_is_pruned_recovered_and_packed(tmp_path: Path) -> None:
    assert vision.main(["--tiny", "--seeds", "5", "--output", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "vision")
    found = {(row["configuration"], row["recovery"]) for row in rows}
    expected = {
        (name, recovery)
        for name, configuration in vision.VISION.items()
        for recovery in ("none", *["reconstruct"] * bool(configuration.pruned), "train")
    }
    assert found == expected and len(rows) == len(expected)
    for row in rows:
        assert row["seed"] == "5" and row["left_out"] == "597"
        assert 0 <= float(row["top1"]) <= 1


def test_training_learns_and_repeats() -> None:
    sizes, data = vision.Sizes(hidden=16, layers=1, heads=2, epochs=10), vision.digits(0)
    model, again = (vision.trained(sizes, data, 3) for _ in range(2))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert vision.top1(model, data) > 0.3  # chance is 0.1
    other = vision.digits(1)
    assert not torch.equal(data.labels, other.labels)
    assert len(data.pixels) + len(data.other_pixels) == 1797


VIT = """\
date,device,driver,torch,commit,model,configuration,batch,img_s,rounds,peak_mib,error,note
2026-11-22,a chip,1.2,2.13,abc,h,dense,1,20.0,20,3000,0.0,
2026-11-22,a chip,1.2,2.13,abc,h,2:4 mlp,1,25.0,20,2500,0.00123,
2026-11-22,a chip,1.2,2.13,abc,h,dense,32,40.0,20,9000,0.0,
2026-11-22,a chip,1.2,2.13,abc,h,2:4 mlp,32,38.0,20,9500,0.00123,
2026-11-22,a chip,1.2,2.13,abc,h,ours,32,,,,,RuntimeError: no room
"""


def test_the_encoder_table_keeps_what_loses_and_what_failed(tmp_path: Path) -> None:
    (tmp_path / "vit_2026-11-22_x_abc.csv").write_text(VIT)
    page = "<!-- bench:vit -->\n<!-- /bench -->"
    assert tables.vit(tmp_path) in tables.render(page, tmp_path)
    lines = tables.vit(tmp_path).splitlines()
    heads = "| model | batch | configuration | img/s | to dense | peak MiB | error |"
    assert lines[0] == heads
    assert lines[2:7] == [
        "| h | 1 | dense | 20.00 | 1.00 | 3000 | 0.0000 |",
        "| h | 1 | 2:4 mlp | 25.00 | **1.25** | 2500 | 0.0012 |",
        "| h | 32 | dense | 40.00 | 1.00 | 9000 | 0.0000 |",
        "| h | 32 | 2:4 mlp | 38.00 | 0.95 | 9500 | 0.0012 |",
        "| h | 32 | ours | - | - | - | - |",
    ]
    assert "a chip, driver 1.2, torch 2.13, 2026-11-22, commit abc, `python -m b" in lines[8]
    assert lines[9] == "Without a figure: ours, batch 32: RuntimeError: no room."


def test_a_ratio_needs_a_dense_row(tmp_path: Path) -> None:
    kept = [line for line in VIT.splitlines() if ",dense,32," not in line]
    (tmp_path / "vit_2026-11-22_x_abc.csv").write_text("\n".join(kept) + "\n")
    assert "| h | 32 | 2:4 mlp | 38.00 | - | 9500 | 0.0012 |" in tables.vit(tmp_path)


VISION = """\
date,device,torch,commit,configuration,recovery,seed,top1,left_out,hidden,layers
2026-11-22,a chip,2.13,abc,dense,none,0,0.9500,597,32,4
2026-11-22,a chip,2.13,abc,2:4 mlp,none,0,0.5000,597,32,4
2026-11-22,a chip,2.13,abc,2:4 mlp,reconstruct,0,0.9000,597,32,4
2026-11-22,a chip,2.13,abc,dense,none,1,0.9300,597,32,4
2026-11-22,a chip,2.13,abc,2:4 mlp,none,1,0.6000,597,32,4
2026-11-22,a chip,2.13,abc,2:4 mlp,reconstruct,1,0.9200,597,32,4
"""


def test_the_vision_table_has_the_mean_and_range_of_the_seeds(tmp_path: Path) -> None:
    (tmp_path / "vision_2026-11-22_x_abc.csv").write_text(VISION)
    lines = tables.vision(tmp_path).splitlines()
    assert lines[0] == "| top-1 | before recovery | reconstructed |"
    assert lines[2] == "| dense | 94.0% (93.0% to 95.0%) | - |"
    assert lines[3] == "| 2:4 mlp | 55.0% (50.0% to 60.0%) | 91.0% (90.0% to 92.0%) |"
    assert lines[5].startswith("Mean and range of 2 seeds, on 597 digits left out; a vision trans")
    assert "a chip, torch 2.13, 2026-11-22, commit abc, `python -m bench.vision`" in lines[5]
