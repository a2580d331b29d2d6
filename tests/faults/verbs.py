"""Every verb that changes a model, on a model small enough to be interrupted hundreds of times."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import secateur as sc
from secateur.files.save import load, save
from secateur.prune.decompose import decompose_
from secateur.prune.permute import permute_

WIDTH = 16

# How many places are tried for each case: a seeded sample, more on demand (FAULTS=200).
TRIED = int(os.environ.get("FAULTS", "8"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up_proj = nn.Linear(WIDTH, 2 * WIDTH)
        self.act = nn.GELU()
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down_proj(self.act(self.up_proj(self.norm(x)))))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def dense() -> Stack:
    return Stack().train()


def pruned() -> Stack:
    model = dense()
    sc.prune_(model, "block:8x8@0.75")
    return model


def packed() -> Stack:
    model = pruned()
    sc.pack_(model, "block:8x8")
    return model


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, WIDTH, generator=generator) for _ in range(4)]


@dataclass(frozen=True)
class Verb:
    """A call that changes the model that `make` returns; it gets an empty `folder` of its own."""

    make: Callable[[], nn.Module]
    call: Callable[[nn.Module, Path], Any]


def _distil(model: nn.Module, folder: Path) -> Any:
    return sc.distil_(model, dense(), batches(), steps=3, checkpoint=folder / "run")


def _load(model: nn.Module, folder: Path) -> Any:
    if not (folder / "saved").exists():
        save(packed(), folder / "saved")
    return load(folder / "saved", model)


def _reconstruct(method: Any, **options: Any) -> Callable[[nn.Module, Path], Any]:
    return lambda model, folder: sc.reconstruct_(model, "2:4", method, batches(), **options)


VERBS: Mapping[str, Verb] = {
    "prune_": Verb(dense, lambda model, folder: sc.prune_(model, "2:4")),
    "prune_ wanda": Verb(
        dense,
        lambda model, folder: sc.prune_(
            model, "2:4", sc.wanda, batches(), checkpoint=folder / "run"
        ),
    ),
    "reconstruct_": Verb(dense, _reconstruct(sc.sparsegpt)),
    "reconstruct_ blockwise": Verb(dense, _reconstruct(sc.blockwise(sc.sparsegpt, epochs=1))),
    "distil_": Verb(pruned, _distil),
    "permute_": Verb(
        dense, lambda model, folder: permute_(model, "2:4", sc.magnitude, batches()[:1])
    ),
    "decompose_": Verb(
        dense,
        lambda model, folder: decompose_(
            model, "2:4", sc.sparsegpt, batches(), folder / "adapter", rank=1
        ),
    ),
    "pack_": Verb(pruned, lambda model, folder: sc.pack_(model, "block:8x8")),
    "unpack_": Verb(packed, lambda model, folder: sc.unpack_(model)),
    "load": Verb(dense, _load),
}


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a failed verb must not change: values, modules, modes, hooks, gradients, globals."""
    return {
        "tensors": {
            n: t.detach().clone()
            for n, t in model.state_dict().items()
            if isinstance(t, Tensor) and not is_lazy(t)
        },
        "kinds": {n: (type(m).__name__, id(m)) for n, m in model.named_modules()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for n, m in model.named_modules()
        },
        "requires": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": {n: p.grad is not None for n, p in model.named_parameters()},
        "globals": (
            torch.is_grad_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.get_default_dtype(),
        ),
    }


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs, in words."""
    found = [key for key in before if key != "tensors" and before[key] != after[key]]
    one, two = before["tensors"], after["tensors"]
    found += [n for n in one.keys() | two.keys() if n not in one or n not in two]
    return found + [n for n in one if n in two and not torch.equal(one[n], two[n])]
