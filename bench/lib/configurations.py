"""Which layers of an image encoder are 2:4, and what they are packed in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

import secateur as sc

ATTENTION = ("*.qkv", "*.proj")
LIN1, LIN2 = ("*.lin1",), ("*.lin2",)
MLP = (*LIN1, *LIN2)
EVERYTHING = (*ATTENTION, *MLP)
WITH_DYNAMIC = (
    *("semi24", "semi24_int8_dynamic", "semi24_fp8_dynamic"),
    *("int8_dynamic", "fp8_dynamic"),
)

Globs = tuple[str, ...]


@dataclass(frozen=True)
class Configuration:
    """Which layers are made 2:4, then which format they are packed in or which are tried.

    `packed` runs kernels for many tokens where it can; `tried` is for `accelerate_`, on all layers.
    """

    pruned: Globs = ()
    packed: Mapping[Globs, str] = field(default_factory=dict)
    tried: tuple[str, ...] = ()


CONFIGURATIONS: dict[str, Configuration] = {
    "dense": Configuration(),
    "int8 dynamic": Configuration(packed={EVERYTHING: "int8_dynamic"}),
    "2:4 mlp": Configuration(MLP, {MLP: "semi24"}),
    "2:4 everything": Configuration(EVERYTHING, {EVERYTHING: "semi24"}),
    "int8 dynamic 2:4 everything": Configuration(EVERYTHING, {EVERYTHING: "semi24_int8_dynamic"}),
    "int8 dynamic attention, int8 dynamic 2:4 lin1, 2:4 lin2": Configuration(
        MLP, {ATTENTION: "int8_dynamic", LIN1: "semi24_int8_dynamic", LIN2: "semi24"}
    ),
    "ours, 2:4 everything": Configuration(EVERYTHING, tried=("semi24",)),
    "ours, 2:4 everything, dynamic formats": Configuration(EVERYTHING, tried=WITH_DYNAMIC),
    "ours, 2:4 mlp, dynamic formats": Configuration(MLP, tried=WITH_DYNAMIC),
}


def named(model: nn.Module, globs: Globs) -> list[str]:
    """The linears whose names match one of the globs."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and any(fnmatchcase(name, glob) for glob in globs)
    ]


def prune(model: nn.Module, configuration: Configuration) -> None:
    """Make the configuration's layers 2:4, by magnitude."""
    if configuration.pruned:
        sc.prune_(model, sc.plan(model, "2:4", layers=configuration.pruned))
