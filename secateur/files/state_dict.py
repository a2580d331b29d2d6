"""State dicts alone, a .safetensors file or shards with an index, as models that can be pruned.

Nothing says which architecture the tensors belong to, so a skeleton of plain layers stands for it:
an nn.Linear for each two-dimensional weight and an nn.Conv2d for each four-dimensional one. What is
not pruned is written again as it was read.
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.core.disk.tensor_files import (
    INDEX_SUFFIX,
    SUFFIX,
    load_file,
    read_metadata,
    read_tensors,
    save_file,
    shapes_in,
    shards,
)
from secateur.files.save import Report, replacing
from secateur.files.sidecar import Sidecar, fingerprints, share_of_zeros, verify_if_saved
from secateur.model.plan import Plan

# Embeddings and output heads, by the names that language models give them.
LOOKUPS = re.compile(r"embed|\bwte\b|\bwpe\b|lm_head")

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Shape and dtype by key.
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class StateDict(nn.Module):
    """A skeleton that holds only the layers which a state dict's names and shapes show."""


@dataclass(frozen=True)
class StateDictFiles:
    """A state dict on disk: its files with their keys, and which layers are left alone and why."""

    path: Path
    files: Mapping[Path, tuple[str, ...]]
    index: Path | None
    left_alone: Mapping[str, str]


def find_state_dict(path: Path) -> Path | None:
    """The file or index of a state dict at a path, or in a folder that holds no model.

    Raises:
        ValueError: if a folder holds several and no index.
    """
    if path.is_file():
        return path if path.name.endswith((SUFFIX, INDEX_SUFFIX)) else None
    if (path / "config.json").exists():
        return None
    found = sorted(path.glob("*" + INDEX_SUFFIX)) or sorted(path.glob("*" + SUFFIX))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{path} holds several state dicts, {names}: name one of them")
    return found[0] if found else None


def read_state_dict(path: Path) -> tuple[nn.Module, StateDictFiles]:
    """The skeleton model of a state dict, and what it takes to write it again.

    Raises:
        ValueError: if a file is missing, damaged or not the one that was saved, or no tensor is the
            weight of a layer.
        OSError: if a file cannot be read.
    """
    verify_if_saved(path.parent)
    index = path if path.name.endswith(INDEX_SUFFIX) else None
    shapes = {file: shapes_in(file) for file in (shards(path) if index else [path])}
    everything = {key: found for keys in shapes.values() for key, found in keys.items()}
    left_alone = _left_alone(everything)
    layers = {
        name: _layer(weight)
        for file, keys in shapes.items()
        for name, weight in _weights(file, keys, left_alone).items()
    }
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(left_alone.items())[:3])
        raise ValueError(
            f"{path} has no weight that can be pruned, a key in .weight with 2 or 4 dimensions"
            + (f" ({reasons})" if reasons else "")
        )
    files = {file: tuple(keys) for file, keys in shapes.items()}
    return _skeleton(layers), StateDictFiles(path, files, index, left_alone)


def linear_shapes(path: Path) -> tuple[tuple[int, int], ...]:
    """The distinct shapes [out, in] of the linear layers in a folder or file, from headers alone.

    Raises:
        ValueError: if there are none, or a file is damaged.
    """
    files = sorted(path.glob("*" + SUFFIX)) if path.is_dir() else [path]
    everything = {key: found for file in files for key, found in shapes_in(file).items()}
    left_alone = _left_alone(everything)
    named = [
        everything[f"{name}.weight"][0] for name in _names(everything) if name not in left_alone
    ]
    shapes = dict.fromkeys((shape[0], shape[1]) for shape in named if len(shape) == 2)
    if not shapes:
        raise ValueError(f"{path} has no dense linear layers in safetensors: give --shape instead")
    return tuple(shapes)


def write_state_dict(
    stored: StateDictFiles,
    model: nn.Module,
    folder: Path,
    *,
    plan: Plan | None,
    reports: Iterable[Report],
) -> None:
    """Write the state dict into `folder`, in files of the same names, with the skeleton's weights.

    Everything else is unchanged, and `secateur.json` lies beside it. The folder appears whole or
    not at all.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    with replacing(folder.resolve()) as partial:
        for file, keys in stored.files.items():
            content = load_file(file)
            for key in keys:
                layer = layers.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
                if layer is not None:
                    content[key] = layer.weight.detach().cpu().contiguous()
            save_file(content, partial / file.name, read_metadata(file) or None)
        if stored.index:
            shutil.copyfile(stored.index, partial / stored.index.name)
        Sidecar(
            form="dense",
            model_class=type(model).__name__,
            files=fingerprints(partial),
            sparsity={name: share_of_zeros(layer.weight) for name, layer in layers.items()},
            plan=plan,
            reports=tuple(report.to_dict() for report in reports),
        ).write(partial)


def _names(shapes: Shapes) -> list[str]:
    """The names that look like layers: a weight of two or four dimensions."""
    keys = [key for key, (shape, _) in shapes.items() if len(shape) in (2, 4)]
    return [key.removesuffix(".weight") for key in keys if key.endswith(".weight")]


def _left_alone(shapes: Shapes) -> dict[str, str]:
    """Why layers of a state dict are not pruned, by name."""
    transposed = _stored_transposed(shapes)
    reasons: dict[str, str] = {}
    for name in _names(shapes):
        shape, dtype = shapes[f"{name}.weight"]
        if LOOKUPS.search(name):
            reasons[name] = "an embedding or output head, by its name"
        elif dtype not in FLOATS:
            reasons[name] = f"stored as {dtype}: only floating-point weights are pruned"
        elif len(shape) == 4 and shape[1] == 1:
            reasons[name] = "a convolution over one channel: depthwise, or the first layer"
        elif name.split(".")[-1] in transposed:
            reasons[name] = "stored as [in, out], by its bias: prune its model folder instead"
    return reasons


def _stored_transposed(shapes: Shapes) -> set[str]:
    """Last parts of the names of layers whose bias, somewhere, is as long as a row (GPT-2's)."""
    found = set()
    for name in _names(shapes):
        shape, _ = shapes[f"{name}.weight"]
        bias, _ = shapes.get(f"{name}.bias", ((), ""))
        if len(shape) == 2 and bias == (shape[1],) != (shape[0],):
            found.add(name.split(".")[-1])
    return found


def _weights(file: Path, keys: Shapes, left_alone: Mapping[str, str]) -> dict[str, Tensor]:
    names = [name for name in _names(keys) if name not in left_alone]
    read = read_tensors(file, [f"{name}.weight" for name in names])
    return {name: read[f"{name}.weight"] for name in names}


def _layer(weight: Tensor) -> nn.Module:
    layer: nn.Linear | nn.Conv2d
    if weight.dim() == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        channels, size = (weight.shape[1], weight.shape[0]), (weight.shape[2], weight.shape[3])
        layer = nn.Conv2d(*channels, size, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _skeleton(layers: Mapping[str, nn.Module]) -> nn.Module:
    """Nested modules so that every layer has its name; a layer may hold others."""
    root = StateDict()
    nodes: dict[tuple[str, ...], nn.Module] = {(): root}
    for name in layers:
        parts = tuple(name.split("."))
        for depth in range(1, len(parts) + 1):
            path = parts[:depth]
            if path not in nodes:
                nodes[path] = layers.get(".".join(path)) or StateDict()
                # not add_module: it refuses names such as `type`, which a state dict may have
                nodes[path[:-1]]._modules[path[-1]] = nodes[path]
    return root
