"""A format with several implementations that run anywhere, for tests of what is chosen.

It stores weights whose odd inputs are all zero. `few` takes at most 8 tokens, `many` any number,
both with an arrangement as large as what is stored; `dense` holds the dense weight. In the format
`lean`, `many` arranges nothing, and nothing runs dense. The format `rounded` stores every weight,
rounded to eighths, and rounds its inputs to sixteenths.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from secateur.formats.contract import Arrangement, Implementation, Packed
from secateur.formats.reference import REFERENCE, anywhere
from secateur.formats.reference import linear as reference

MOST_OF_FEW = 8


@dataclass(frozen=True)
class Toy:
    """`step` is between columns that are stored; those of a format that rounds are all of them."""

    name: str
    implementations: tuple[Implementation, ...] = field(compare=False)
    step: int = 2
    is_exact: bool = True

    tensors = ("values",)
    prune_to = ""

    def __str__(self) -> str:
        return self.name

    def like(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> "Toy":
        return self

    def why_not(self, weight: Tensor) -> str | None:
        zeros = self.name != "toy" or not weight[:, 1::2].any()
        return None if zeros else "toy needs zeros at odd inputs"

    def density(self, weight: Tensor) -> float:
        return 1 / self.step

    def pack(self, weight: Tensor) -> Packed:
        values = weight[:, :: self.step]
        values = values.clone() if self.is_exact else (8 * values).round() / 8
        return Packed(self, (weight.shape[0], weight.shape[1]), weight.dtype, {"values": values})

    def unpack(self, packed: Packed) -> Tensor:
        dense = packed["values"].new_zeros(packed.shape)
        dense[:, :: self.step] = packed["values"]
        return dense

    def empty(self, shape: tuple[int, int], stored: int, dtype: torch.dtype) -> Packed:
        return self.pack(torch.zeros(shape, dtype=dtype))

    def why_broken(self, packed: Packed) -> str | None:
        return None


def rounded_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return dense_linear((16 * x).round() / 16, packed["values"], bias)


def few(packed: Packed, tokens: int) -> str | None:
    return None if tokens <= MOST_OF_FEW else f"few takes at most {MOST_OF_FEW} tokens"


def half(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    values, *_ = packed.tensors.values()  # those that are stored, or any copy of them
    return dense_linear(x[:, ::2], values, bias)


def whole(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return dense_linear(x, packed["dense"], bias)


def own(name: str) -> Arrangement:
    """The values once more, for one implementation alone."""
    return Arrangement((name,), lambda packed: {name: packed["values"].clone()})


DENSE = Arrangement(("dense",), lambda packed: {"dense": packed.dense()})
TOY = (
    Implementation("few", half, few, own("few_values")),
    Implementation("many", half, anywhere, own("many_values")),
    Implementation("dense", whole, anywhere, DENSE),
    REFERENCE,
)
ROUNDED = (
    Implementation("fast", rounded_linear, anywhere),
    Implementation("reference", rounded_linear, anywhere),
)

toy = Toy("toy", TOY)
lean = Toy("lean", (TOY[0], Implementation("many", reference, anywhere), REFERENCE))
rounded = Toy("rounded", ROUNDED, step=1, is_exact=False)
