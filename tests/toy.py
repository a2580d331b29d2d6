"""A format with several implementations that run anywhere, for tests of what is chosen.

It stores weights whose odd inputs are all zero. `few` takes at most 8 tokens, `many` any number,
both with an arrangement as large as what is stored; `dense` holds the dense weight. In the format
`lean`, `many` arranges nothing, and nothing runs dense. The format `rounded` stores every weight,
rounded to eighths, and rounds its inputs to sixteenths.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from secateur.formats.contract import Implementation
from secateur.formats.op import register

MOST_OF_FEW = 8


@dataclass(frozen=True)
class PackedToy:
    shape: tuple[int, int]
    values: Tensor
    format: str = "toy"

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}


@dataclass(frozen=True)
class PackedLean(PackedToy):
    format: str = "lean"


@dataclass(frozen=True)
class PackedRounded(PackedToy):
    format: str = "rounded"


def unpack(packed: PackedToy) -> Tensor:
    dense = packed.values.new_zeros(packed.shape)
    dense[:, ::2] = packed.values
    return dense


def rounded_linear(x: Tensor, packed: PackedToy, bias: Tensor | None) -> Tensor:
    return dense_linear((16 * x).round() / 16, packed.values, bias)


def any_number(packed: PackedToy, tokens: int) -> str | None:
    return None


def few(packed: PackedToy, tokens: int) -> str | None:
    return None if tokens <= MOST_OF_FEW else f"few takes at most {MOST_OF_FEW} tokens"


def half(x: Tensor, packed: PackedToy, bias: Tensor | None, values: Tensor) -> Tensor:
    return dense_linear(x[:, ::2], values, bias)


def whole(x: Tensor, packed: PackedToy, bias: Tensor | None, weight: Tensor) -> Tensor:
    return dense_linear(x, weight, bias)


def reference(x: Tensor, packed: PackedToy, bias: Tensor | None) -> Tensor:
    return dense_linear(x, unpack(packed), bias)


def values(packed: PackedToy) -> tuple[Tensor]:
    return (packed.values.clone(),)


TOY = (
    Implementation("few", half, few, ("values",), values),
    Implementation("many", half, any_number, ("values",), values),
    Implementation("dense", whole, any_number, ("weight",), lambda packed: (unpack(packed),)),
    Implementation("reference", reference, any_number),
)
LEAN = (TOY[0], Implementation("many", reference, any_number), TOY[3])
ROUNDED = (
    Implementation("fast", rounded_linear, any_number),
    Implementation("reference", rounded_linear, any_number),
)


def folder(
    name: str,
    packed_type: type[PackedToy],
    implementations: tuple[Implementation, ...],
    **functions: Callable[..., Any] | None,
) -> SimpleNamespace:
    unpacked = functions["unpack"]
    assert unpacked is not None
    linear, unpack_op = register(name, packed_type, ("values",), unpacked, implementations)
    return SimpleNamespace(
        IMPLEMENTATIONS=implementations,
        LINEAR=linear,
        UNPACK=unpack_op,
        packed_type=packed_type,
        empty=None,
        broken=None,
        **functions,
    )


toy = folder(
    "toy",
    PackedToy,
    TOY,
    pack=lambda weight: PackedToy(tuple(weight.shape), weight[:, ::2].clone()),
    unpack=unpack,
    dequantised=None,
    why_not=lambda weight: "toy needs zeros at odd inputs" if weight[:, 1::2].any() else None,
    density=lambda weight: 0.5,
)
lean = folder(
    "lean",
    PackedLean,
    LEAN,
    pack=lambda weight: PackedLean(tuple(weight.shape), weight[:, ::2].clone()),
    unpack=unpack,
    dequantised=None,
    why_not=lambda weight: None,
    density=lambda weight: 0.5,
)
rounded = folder(
    "rounded",
    PackedRounded,
    ROUNDED,
    pack=lambda weight: PackedRounded(tuple(weight.shape), (8 * weight).round() / 8),
    unpack=lambda packed: packed.values.clone(),
    dequantised=lambda packed: packed.values.clone(),
    why_not=lambda weight: None,
    density=lambda weight: 1.0,
)
