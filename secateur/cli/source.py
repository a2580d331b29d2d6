"""The model that a command names: opened, written again, and what was recorded beside it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from secateur.cli.console import working
from secateur.files.save import Report, load, write_model
from secateur.files.sidecar import SIDECAR, read_sidecar, verify_if_saved
from secateur.files.state_dict import (
    StateDictFiles,
    find_state_dict,
    read_state_dict,
    write_state_dict,
)
from secateur.integrations.transformers import (
    FROM_GGUF,
    GGUF,
    PACKED_FILES,
    PICKLED,
    converted,
    load_folder,
    no_folder,
    tokenizer_files,
    without_progress_bars,
)
from secateur.model.plan import Plan
from secateur.prune.verbs import LayerResult, PruneReport

RUN_IN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO, STORED = "auto", "stored"


@dataclass(frozen=True)
class Opened:
    """An opened model; `state_dict` if it is one, without an architecture.

    `stored` maps parameters that are held in another dtype to their dtype on disk.
    """

    path: Path
    model: nn.Module
    state_dict: StateDictFiles | None
    stored: Mapping[str, torch.dtype]

    @property
    def size(self) -> int:
        """Bytes of its weight files."""
        return bytes_of(self.state_dict.files if self.state_dict else model_files(self.path))

    @property
    def left_alone(self) -> Mapping[str, str]:
        """Tensors of a state dict that are no layers to prune, each with the reason."""
        return self.state_dict.left_alone if self.state_dict else {}

    def write(
        self, out: Path, *, plan: Plan | None, reports: Iterable[Report], overwrite: bool
    ) -> None:
        """Write the model into the folder `out`, in its stored dtypes, with its tokenizer.

        The model keeps its dtypes; its weights are afterwards those written, rounded.
        """
        if self.state_dict:
            write_state_dict(self.state_dict, self.model, out, plan=plan, reports=reports)
            return
        held = {n: p for n, p in self.model.named_parameters() if n in self.stored}
        dtypes = {name: parameter.dtype for name, parameter in held.items()}
        for name, parameter in held.items():
            parameter.data = parameter.data.to(self.stored[name])
        write_model(
            self.model, out, plan=plan, reports=reports, overwrite=overwrite,
            beside=tokenizer_files(self.path),
        )  # fmt: skip
        for name, parameter in held.items():
            parameter.data = parameter.data.to(dtypes[name])


def open_source(name: str | Path, dtype: str = STORED, device: str = "cpu") -> Opened:
    """The model at a path, loaded and moved to the device.

    Raises:
        ValueError: if it is neither a Hugging Face folder nor a state dict, or an option does not
            apply.
    """
    path = Path(name)
    if not path.exists():
        raise ValueError(no_folder(path))
    file = find_state_dict(path)
    if file is None and path.is_file():
        raise ValueError(
            f"{path} is no model: name a Hugging Face folder, a .safetensors file or its index.json"
            + (f"; {converted(path)}" if path.suffix in PICKLED else "")
            + (f"; {FROM_GGUF}" if path.suffix == GGUF else "")
        )
    if file is None:
        return open_folder(path, dtype, device)
    if dtype in RUN_IN:
        raise ValueError("--dtype needs a model folder: a state dict is never run")
    with working(f"reading {file.name}"):
        model, files = read_state_dict(file)
    return Opened(path, model, files, {})


def open_folder(folder: Path, dtype: str = STORED, device: str = "cpu") -> Opened:
    """The model in a Hugging Face folder, dense or packed, on the device and in the dtype.

    `dtype` is "stored", the name of one, or "auto": on a CPU float32, because most CPUs compute in
    16 bits many times slower, and on a GPU as stored.
    """
    where, wanted = find_device(device), find_dtype(dtype)
    with working(f"loading {folder.name}"):
        if folder.is_dir() and any(folder.glob(PACKED_FILES)):
            model = load(folder)
        else:
            without_progress_bars()
            verify_if_saved(folder)
            model = load_folder(folder)
        if dtype == AUTO and where.type == "cpu" and _in_16_bits(model):
            wanted = torch.float32
        stored = {}
        if wanted is not None:
            stored = {name: p.dtype for name, p in model.named_parameters() if p.dtype != wanted}
            model = model.to(wanted)
        return Opened(folder, model.to(where), None, stored)


def parameters_in(files: Iterable[Path]) -> int:
    """The count of numbers in the safetensors files, from their headers alone."""
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            total += sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
    return total


def bytes_of(files: Iterable[Path]) -> int:
    """What the files take on disk."""
    return sum(file.stat().st_size for file in files)


def model_files(folder: Path) -> list[Path]:
    """The weight files of a model's folder, in which there may be other safetensors files."""
    return sorted(folder.glob("model*.safetensors"))


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU if there is one.

    Raises:
        ValueError: if it does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device, dtype=torch.float32)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from None
    return device


def find_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name; None for `auto` and `stored`.

    Raises:
        ValueError: if it is not one that models are run in.
    """
    if name not in (*RUN_IN, AUTO, STORED):
        known = ", ".join((AUTO, STORED, *RUN_IN))
        raise ValueError(f"--dtype needs to be one of {known}, got {name!r}")
    return RUN_IN.get(name)


@dataclass(frozen=True)
class Recorded:
    """A report as plain data, to be saved again as it was."""

    data: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.data)


def recorded_reports(folder: Path) -> tuple[Plan | None, list[Recorded]]:
    """The plan and the reports that were saved with the folder; none without a sidecar."""
    if not (folder / SIDECAR).is_file():
        return None, []
    saved = read_sidecar(folder)
    return saved.plan, [Recorded(report) for report in saved.reports]


def prune_reports(reports: list[Recorded]) -> list[PruneReport]:
    """The reports that `prune_` or `reconstruct_` made."""
    names = {field.name for field in fields(LayerResult)}
    said = {field.name for field in fields(PruneReport)}
    found = []
    for report in reports:
        layers = report.data.get("layers")
        rows = [row for row in layers if isinstance(row, dict)] if isinstance(layers, list) else []
        if rows and all(set(row) == names for row in rows) and said <= set(report.data):
            results = tuple(LayerResult(**row) for row in rows)
            data = {name: report.data[name] for name in said}
            found.append(PruneReport(**data | {"layers": results}))
    return found


def _in_16_bits(model: nn.Module) -> bool:
    return any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
