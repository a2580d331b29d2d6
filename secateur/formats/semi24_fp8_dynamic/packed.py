"""The packed weight of `semi24_fp8`; only what the linear does with its inputs differs."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats import two_of_four
from secateur.formats.contract import check_quantisable, why_not_quantisable
from secateur.formats.semi24_fp8 import packed as weight_only
from secateur.formats.semi24_fp8.packed import PackedSemi24Fp8, broken, density, dequantised, unpack

__all__ = [
    "PackedSemi24Fp8Dynamic",
    "broken",
    "density",
    "dequantised",
    "empty",
    "pack",
    "unpack",
    "why_not",
]


@dataclass(frozen=True)
class PackedSemi24Fp8Dynamic(PackedSemi24Fp8):
    """The tensors of `PackedSemi24Fp8`, for a linear that rounds its inputs too."""

    @property
    def format(self) -> str:
        return "semi24_fp8_dynamic"


def pack(weight: Float[Tensor, "out in"]) -> PackedSemi24Fp8Dynamic:
    """The 2:4 weight rounded to `Fp8()`, as `semi24_fp8` packs it.

    Cost: 0.625 bytes a weight and a scale a row, 0.3125 of a 16-bit dense weight.
    Raises: ValueError if a group of four has more than two nonzeros, if in_features is not a
        multiple of 4, if a weight is not finite, or for a float64 weight.
    """
    check_quantisable(weight, "semi24_fp8_dynamic")
    return _dynamic(weight_only.pack(weight))


def why_not(weight: Float[Tensor, "out in"]) -> str | None:
    """None if the weight is at most 2:4 and no float64, else what it is."""
    problem = why_not_quantisable(weight, "semi24_fp8_dynamic")
    return problem or two_of_four.why_not(weight, "semi24_fp8_dynamic")


def empty(shape: tuple[int, int], stored: int, dtype: torch.dtype) -> PackedSemi24Fp8Dynamic:
    """Zeros of the right sizes, for a loader to fill.

    Raises: ValueError if the description is of another shape.
    """
    return _dynamic(weight_only.empty(shape, stored, dtype))


def _dynamic(packed: PackedSemi24Fp8) -> PackedSemi24Fp8Dynamic:
    return PackedSemi24Fp8Dynamic(packed.shape, *packed.tensors().values())
