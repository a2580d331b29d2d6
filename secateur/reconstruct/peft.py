"""A folder with a LoRA adapter in PEFT's format, so that whatever loads PEFT's loads ours.

`adapter_config.json` says where the factors go, `adapter_model.safetensors` holds them. Both are
written without PEFT. Source: PEFT's documentation of its checkpoint format.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from secateur.core.disk.atomic import appearing_whole
from secateur.core.disk.tensor_files import save_file

# What PEFT puts before a module's name: its own wrapper and the tuner's.
PREFIX = "base_model.model."


def require_new(folder: Path) -> None:
    """Raise a ValueError if the folder exists."""
    if folder.exists():
        raise ValueError(f"{folder} exists: remove it, or name a new folder for the adapter")


def write_adapter(
    folder: Path,
    factors: Mapping[str, tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]],
    modules: Collection[str],
    *,
    task_type: str | None,
    transposed: bool,
) -> None:
    """Write the factors `(B, A)` of each layer, all of one rank, as an adapter that adds B A x.

    `modules` are the names of all modules of the model, `task_type` is PEFT's name for what the
    model does, and `transposed` says that weights are stored `[in, out]`, like GPT-2's. The folder
    appears whole or not at all.

    Raises:
        ValueError: if the folder exists.
    """
    require_new(folder)
    rank = next(A.shape[0] for _, A in factors.values())
    tensors = {}
    for name, (B, A) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A.contiguous().cpu()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.contiguous().cpu()
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # PEFT scales B A by lora_alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": _targets(list(factors), modules),
        "modules_to_save": None,
    }
    with appearing_whole(folder, lambda name: False) as partial:
        save_file(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
        text = json.dumps(config, indent=2) + "\n"
        (partial / "adapter_config.json").write_text(text, encoding="utf-8")


def _targets(names: list[str], modules: Collection[str]) -> list[str] | str:
    """The layers' names, or a regular expression for them where names would match too much.

    PEFT matches a listed name with every module that ends in a dot and that name (`0` matches
    `blocks.0`), and takes a string as a regular expression for whole names.
    """
    ends = tuple(f".{name}" for name in names)
    if any(module.endswith(ends) for module in set(modules).difference(names)):
        return "|".join(re.escape(name) for name in names)
    return names
