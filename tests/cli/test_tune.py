"""`secateur tune`: what is measured, what is remembered, and what is refused; a stand-in measures.

The figures are prescribed, so that nothing here needs a GPU.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from secateur.cli import app
from secateur.cli import tune as tuning
from secateur.formats.kernels.decode24 import choose
from secateur.formats.kernels.decode24.arrange import Kind
from secateur.formats.kernels.decode24.choose import own_table
from secateur.formats.kernels.decode24.config import Case, LaunchConfig
from secateur.formats.kernels.decode24.tune import Timed

CHIP = "A GPU, 132 SMs"
FAST, SLOW, RULE = (LaunchConfig(1, warps, 2, 1, 1, 3, 1) for warps in (2, 4, 8))
BF16 = torch.bfloat16


class Gpu:
    """Stands in for the device and for `tune`: it notes what it is asked and times two configs."""

    def __init__(self) -> None:
        self.capability = (9, 0)
        self.asked: list[Case] = []
        self.known: dict[Case, Sequence[LaunchConfig]] = {}
        self.most = 0
        self.stop_after = 99
        self.nothing_right = False

    def measure(
        self,
        cases: Sequence[Case],
        device: torch.device,
        most: int,
        known: Mapping[Case, Sequence[LaunchConfig]],
    ) -> Iterator[tuple[Case, list[Timed]]]:
        self.asked, self.most, self.known = list(cases), most, dict(known)
        for number, case in enumerate(cases):
            if number == self.stop_after:
                raise KeyboardInterrupt
            yield case, [] if self.nothing_right else [Timed(FAST, 2.5), Timed(SLOW, 4.0)]


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    properties = SimpleNamespace(name="A GPU", multi_processor_count=132)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choose, "PACKAGED", tmp_path / "packaged.json")
    monkeypatch.setattr(choose, "by_cost_model", lambda case, count, warpgroups: RULE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu.capability)
    monkeypatch.setattr(tuning, "find_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(tuning, "measure", gpu.measure)
    choose._table.cache_clear()
    return gpu


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


def said(result: Any, code: int = 0) -> str:
    assert result.exit_code == code, result.output
    text: str = result.stdout
    return text


def refused(result: Any) -> str:
    """The one line that an error is."""
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    return str(line)


def remembered() -> Any:
    return json.loads(own_table().read_text())


def test_the_fastest_is_shown_and_remembered(gpu: Gpu) -> None:
    text = said(run("--shape", "4096x14336", "--format", "semi24_int4"))
    assert remembered() == {
        CHIP: {"int4/128 4096x14336": {"2": str(FAST), "16": str(FAST)}},
    }
    (line,) = [line for line in text.splitlines() if "<=16" in line]
    rate = 256 * 112 * 800 / 2.5e-6 / 1e12  # bytes of the units, by the time
    assert line.split() == [
        *("int4/128", "4096x14336", "<=16", str(FAST), "2.50", f"{rate:.2f}", str(SLOW), "4.00"),
    ]
    assert f"kept in {own_table()}" in text
    assert gpu.most == 100


def test_what_was_remembered_stays_and_is_measured_again(gpu: Gpu) -> None:
    other = {"another": {"w16 16x64": {"2": str(SLOW)}}}
    own_table().parent.mkdir()
    own_table().write_text(json.dumps({**other, CHIP: {"w16 64x128": {"8": str(SLOW)}}}))
    said(run("--shape", "64x128", "--tokens", 5, "--tokens", 1, "--cuts", 7))
    assert remembered() == {**other, CHIP: {"w16 64x128": {"2": str(FAST), "8": str(FAST)}}}
    few, most = gpu.asked[1], gpu.asked[0]
    assert gpu.known == {few: [RULE], most: [SLOW]} and (few.tokens, most.tokens) == (2, 8)
    assert gpu.most == 7


@pytest.mark.parametrize(
    ("format", "kind", "grouped"),
    [
        ("semi24", Kind.W16, False),
        ("semi24_int4", Kind.INT4, True),
        ("semi24_int4:channel", Kind.INT4, False),
        ("semi24_int8", Kind.INT8, False),
        ("semi24_fp8", Kind.FP8, False),
    ],
)
def test_formats_are_kinds(gpu: Gpu, format: str, kind: Kind, grouped: bool) -> None:
    said(run("--shape", "32x64", "--format", format, "--tokens", 3))
    assert gpu.asked == [Case(kind, grouped, BF16, 32, 64, 8)]


def test_every_case_is_measured_once(gpu: Gpu) -> None:
    shapes = ("--shape", "32x64", "--shape", "16x128", "--shape", "32x64")
    tokens = ("--tokens", 1, "--tokens", 2, "--tokens", 64)
    found = json.loads(said(run(*shapes, *tokens, "--format", "semi24", "--json")))
    sizes = [(32, 64, 2), (32, 64, 64), (16, 128, 2), (16, 128, 64)]
    assert gpu.asked == [Case(Kind.W16, False, BF16, *size) for size in sizes]
    assert [(entry["layer"], entry["most_tokens"]) for entry in found] == [
        (f"w16 {rows}x{columns}", tokens) for rows, columns, tokens in sizes
    ]
    assert found[2]["measured"][0] == {
        "config": str(FAST), "us": 2.5, "tb_per_s": pytest.approx(2304 / 2.5e-6 / 1e12),
    }  # fmt: skip


def test_a_model_gives_the_shapes_of_its_linear_layers(gpu: Gpu, tmp_path: Path) -> None:
    weight = torch.zeros(32, 64)
    first = {
        "a.up.weight": weight,
        "a.norm.weight": torch.zeros(64),
        "lm_head.weight": torch.ones(96, 64),
    }
    second = {"a.down.weight": torch.zeros(64, 128), "b.up.weight": weight}
    save_file(first, tmp_path / "model-1.safetensors")
    save_file(second, tmp_path / "model-2.safetensors")
    said(run(tmp_path, "--tokens", 1))
    assert [(case.rows, case.columns) for case in gpu.asked] == [(32, 64), (64, 128)]
    said(run(tmp_path / "model-2.safetensors", "--tokens", 1))
    assert [(case.rows, case.columns) for case in gpu.asked] == [(64, 128), (32, 64)]


def test_a_case_without_a_right_launch_config_is_told_and_not_remembered(gpu: Gpu) -> None:
    gpu.nothing_right = True
    text = said(run("--shape", "32x64", "--tokens", 1))
    assert "none is right: the cost model stays" in text
    assert not own_table().exists()


def test_an_interruption_keeps_what_is_finished(gpu: Gpu) -> None:
    gpu.stop_after = 1
    result = run("--shape", "32x64", "--shape", "16x64", "--tokens", 1)
    said(result, 130)
    assert result.stderr == f"\ninterrupted: 1 of 2 layers are kept in {own_table()}\n"
    assert remembered() == {CHIP: {"w16 32x64": {"2": str(FAST)}}}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "tune needs a model or --shape, got neither"),
        (["folder", "--shape", "32x64"], "tune needs a model or --shape, got both"),
        (["--shape", "32*64"], "--shape needs out_features x in_features, got '32*64': write"),
        (["--shape", "0x64"], "got '0x64'"),
        (["--shape", "24x64"], "24x64 cannot be tuned: the decode kernel needs out_features"),
        (["--shape", "32x64", "--tokens", "65"], "serves at most 64 tokens, got 65"),
        (
            ["--shape", "32x64", "--format", "csr"],
            "needs formats of 2:4 or 4:8 weights, got 'csr': choose",
        ),
    ],
)
def test_what_tune_refuses(gpu: Gpu, arguments: list[str], told: str) -> None:
    assert told in refused(run(*arguments))
    assert gpu.asked == [] and not own_table().exists()


def test_a_folder_without_layers_is_refused(gpu: Gpu, tmp_path: Path) -> None:
    assert "has no dense linear layers in safetensors" in refused(run(tmp_path))
    assert "missing.safetensors does not exist" in refused(run(tmp_path / "missing.safetensors"))


def test_a_gpu_without_the_kernel_is_refused(gpu: Gpu) -> None:
    gpu.capability = (7, 5)
    line = refused(run("--shape", "32x64"))
    assert "32x64 cannot be tuned: the decode kernel needs compute capability 8.0" in line


def test_a_broken_table_is_found_before_the_work(gpu: Gpu) -> None:
    own_table().parent.mkdir()
    own_table().write_text("[")
    assert f"{own_table()} needs to be a table of launch configs" in refused(
        run("--shape", "32x64")
    )
    assert gpu.asked == []


def test_without_a_gpu_it_says_so() -> None:
    line = refused(run("--shape", "4096x4096", "--device", "cpu"))
    assert line == "error: tuning needs a CUDA GPU, got cpu: run it where the model will run"
