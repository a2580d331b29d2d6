"""The config that is taken: the user's measurement, then the package's, then the cost model's."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from secateur.formats.kernels.decode24 import choose as module
from secateur.formats.kernels.decode24.arrange import Kind
from secateur.formats.kernels.decode24.choose import choose, own_table, remember
from secateur.formats.kernels.decode24.config import Case, LaunchConfig
from secateur.formats.kernels.decode24.launch_configs import PORTABLE
from secateur.formats.kernels.measured import chip

GPU = torch.device("cuda:0")
CHIP = "A GPU, 132 SMs"
CASE = Case(Kind.INT4, True, torch.bfloat16, 4096, 14336, 8)
FIRST, SECOND = LaunchConfig(1, 2, 3, 1, 1, 2, 0), LaunchConfig(2, 4, 1, 1, 1, 3, 1)
BY_MODEL = LaunchConfig(8, 8, 8, 8, 8, 8, 2)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, no packaged table, and a GPU of 132 SMs."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "PACKAGED", tmp_path / "packaged.json")
    found = SimpleNamespace(name="A GPU", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(module, "by_cost_model", lambda *arguments, **options: BY_MODEL)


def write(path: Path, table: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table))


def test_the_own_table_goes_before_the_packaged_one(tmp_path: Path) -> None:
    assert own_table() == tmp_path / "cache" / "decode24.json"
    write(own_table(), {CHIP: {"int4/128 4096x14336": {"8": str(FIRST)}}})
    other = {"8": str(SECOND), "16": str(SECOND)}
    write(module.PACKAGED, {CHIP: {"int4/128 4096x14336": other}})
    assert choose(CASE, GPU) == FIRST
    sixteen = Case(
        Kind.INT4, True, torch.float16, 4096, 14336, 16
    )  # a launch config holds for any dtype
    assert choose(sixteen, GPU) == SECOND


def test_a_launch_of_a_step_has_a_config_of_its_own() -> None:
    few = Case(Kind.INT4, True, torch.bfloat16, 4096, 14336, 2)
    write(own_table(), {CHIP: {"int4/128 4096x14336": {"2": str(FIRST), "step": str(SECOND)}}})
    assert choose(few, GPU) == FIRST and choose(few, GPU, in_step=True) == SECOND
    write(own_table(), {CHIP: {"int4/128 4096x14336": {"2": str(FIRST)}}})
    module._table.cache_clear()
    assert choose(few, GPU, in_step=True) == FIRST


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"A GPU, 131 SMs": {"int4/128 4096x14336": {"8": str(FIRST)}}},
        {CHIP: {"int4 4096x14336": {"8": str(FIRST)}}},
        {CHIP: {"int4/128 4096x14336": {"16": str(FIRST)}}},
    ],
    ids=["nothing", "another chip", "another weight", "more tokens"],
)
def test_what_was_not_measured_goes_by_the_cost_model(table: object) -> None:
    write(own_table(), table)
    assert choose(CASE, GPU) == BY_MODEL


def test_the_rule_is_told_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def by_cost_model(case: Case, multiprocessors: int, warpgroups: bool) -> LaunchConfig:
        asked.append((case, multiprocessors, warpgroups))
        return BY_MODEL

    monkeypatch.setattr(module, "by_cost_model", by_cost_model)
    choose(CASE, GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    choose(CASE, GPU)
    assert asked == [(CASE, 132, True), (CASE, 132, False)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert choose(CASE, GPU) == PORTABLE and len(asked) == 2


def test_without_a_table_or_a_home_it_goes_by_the_cost_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose(CASE, GPU) == BY_MODEL

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(module, "own_table", homeless)
    write(module.PACKAGED, {CHIP: {"int4/128 4096x14336": {"8": str(SECOND)}}})
    module._table.cache_clear()
    assert choose(CASE, GPU) == SECOND


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '{"a": [1]}', '{"a": {"b": {"8": "1,2"}}}', '{"a": {"b": {"8": 1}}}', "\xff"],
)
def test_a_broken_table_names_its_file(text: str) -> None:
    own_table().parent.mkdir()
    own_table().write_text(text, encoding="latin-1")
    with pytest.raises(
        ValueError, match=r"decode24\.json needs to be a table of launch configs, got"
    ) as told:
        choose(CASE, GPU)
    assert str(own_table()) in str(told.value)
    assert "delete it and run `secateur tune`" in str(told.value)
    with pytest.raises(ValueError, match="needs to be a table"):
        remember(own_table(), CHIP, CASE, FIRST)
    assert own_table().read_text(encoding="latin-1") == text


def test_a_launch_config_is_remembered_beside_the_others() -> None:
    assert choose(CASE, GPU) == BY_MODEL  # the file is read, and found missing
    other = {"another": {"w16 16x64": {"2": str(FIRST)}}}
    write(own_table(), other)
    few = Case(Kind.INT4, True, torch.bfloat16, 4096, 14336, 5)
    remember(own_table(), chip(GPU), few, SECOND)
    assert choose(CASE, GPU) == SECOND  # of up to eight tokens, and at once
    remember(own_table(), CHIP, Case(Kind.INT4, True, torch.bfloat16, 4096, 14336, 9), FIRST)
    remember(own_table(), CHIP, CASE, FIRST)
    remember(own_table(), CHIP, Case(Kind.W16, False, torch.bfloat16, 32, 64, 1), FIRST)
    assert json.loads(own_table().read_text()) == {
        **other,
        CHIP: {
            "int4/128 4096x14336": {"8": str(FIRST), "16": str(FIRST)},
            "w16 32x64": {"2": str(FIRST)},
        },
    }
    assert choose(CASE, GPU) == FIRST
    assert [path.name for path in own_table().parent.iterdir()] == ["decode24.json"]


def test_a_failed_write_leaves_the_table_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    remember(own_table(), CHIP, CASE, FIRST)
    before = own_table().read_bytes()

    def refused(path: Path, target: Path) -> Path:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(OSError, match="Read-only"):
        remember(own_table(), CHIP, CASE, SECOND)
    assert own_table().read_bytes() == before
    assert [path.name for path in own_table().parent.iterdir()] == ["decode24.json"]
