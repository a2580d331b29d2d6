"""Adapter folders: read back by PEFT's documented rules, and by PEFT where it is installed."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import secateur.reconstruct.peft
from secateur.reconstruct.peft import write_adapter
from tests.models import Decoder


def named(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


def factors(model: nn.Module, names: list[str], rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name in names:
        out, in_ = model.get_submodule(name).weight.shape
        B = torch.randn(out, rank, generator=generator)
        made[name] = B, torch.randn(rank, in_, generator=generator)
    return made


def write(folder: Path, model: nn.Module, names: list[str], **options: Any) -> Any:
    made = factors(model, names)
    options = {"task_type": None, "transposed": False, **options}
    write_adapter(folder, made, named(model), **options)
    return made


def config(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return read


def targeted(model: nn.Module, folder: Path) -> set[str]:
    """The modules that PEFT adapts: a string matches whole names, a list entry their ends too."""
    targets = config(folder)["target_modules"]
    if isinstance(targets, str):
        return {name for name in named(model) if re.fullmatch(targets, name)}
    ends = tuple(f".{target}" for target in targets)
    return {name for name in named(model) if name in targets or name.endswith(ends)}


def merged(model: nn.Module, folder: Path) -> nn.Module:
    """A copy of the model with the adapter added to its weights by the rules of the format."""
    read, tensors = config(folder), load_file(folder / "adapter_model.safetensors")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name in targeted(model, folder):
            A = tensors.pop(f"base_model.model.{name}.lora_A.weight")
            B = tensors.pop(f"base_model.model.{name}.lora_B.weight")
            assert A.shape[0] == B.shape[1] == read["r"]
            change = read["lora_alpha"] / read["r"] * (B @ A)
            copied.get_submodule(name).weight += change.T if read["fan_in_fan_out"] else change
    assert not tensors, "tensors of modules that are not adapted"
    return copied


def test_the_factors_are_added_to_the_layers_they_are_of(tmp_path: Path) -> None:
    model = Decoder()
    names = ["blocks.0.attention.q_proj", "blocks.2.down_proj"]
    made = write(tmp_path / "new" / "adapter", model, names)
    with_it = merged(model, tmp_path / "new" / "adapter")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            change = with_it.get_submodule(name).weight - module.weight
            expected = made[name][0] @ made[name][1] if name in names else torch.zeros(())
            torch.testing.assert_close(change, expected.expand_as(change), rtol=1e-5, atol=1e-5)


def test_the_configuration_is_an_ordinary_one(tmp_path: Path) -> None:
    write(tmp_path / "a", Decoder(), ["lm_head"], task_type="CAUSAL_LM", transposed=True)
    assert config(tmp_path / "a") == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": 2,
        "lora_alpha": 2,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": True,
        "target_modules": ["lm_head"],
        "modules_to_save": None,
    }
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_names_that_other_modules_end_in_are_matched_whole(tmp_path: Path) -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 4))
    write(tmp_path / "a", model, ["0", "1.1"])
    assert targeted(model, tmp_path / "a") == {"0", "1.1"}
    assert config(tmp_path / "a")["target_modules"] == r"0|1\.1"
    write(tmp_path / "b", model, ["2", "1.1"])
    assert config(tmp_path / "b")["target_modules"] == ["2", "1.1"]


def test_what_exists_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("kept")
    with pytest.raises(ValueError, match=r"a exists: remove it, or name a new folder"):
        write(tmp_path / "a", Decoder(), ["lm_head"])
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.touch()
        raise OSError("disk full")

    monkeypatch.setattr(secateur.reconstruct.peft, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "a", Decoder(), ["lm_head"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "names", [["blocks.0.attention.q_proj", "blocks.2.down_proj"], ["lm_head"]]
)
def test_peft_loads_it(tmp_path: Path, names: list[str]) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is no dependency; it checks the folder here")
    model, tokens = Decoder().eval(), torch.arange(12).reshape(2, 6)
    write(tmp_path / "a", model, names)
    expected = merged(model, tmp_path / "a")(tokens)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "a")
    torch.testing.assert_close(adapted(tokens), expected, rtol=1e-4, atol=1e-4)
