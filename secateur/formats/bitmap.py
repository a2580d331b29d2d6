"""Unstructured weights as nonzeros and a bitmask: the smallest form below about 90 % zeros."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from secateur.formats.contract import (
    Arrangement,
    Format,
    Implementation,
    Packed,
    check_stored,
    dense_shape,
    why_no_weight,
    why_not_smaller,
)
from secateur.formats.kernels import bits
from secateur.formats.reference import REFERENCE

Multiply = Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]


def _arranged(packed: Packed) -> dict[str, Tensor]:
    lines, starts = bits.arrange(_unpack_bits(packed), packed["values"])
    return {"lines": lines, "starts": starts}


def _restored(packed: Packed) -> dict[str, Tensor]:
    keep, values = bits.restore(packed["lines"], packed["starts"], *packed.shape, packed.dtype)
    return {"values": values, "bitmask": _pack_bits(keep)}


LINES = Arrangement(("lines", "starts"), _arranged, _restored)


def _implementation(name: str, multiply: Multiply, most_tokens: int | None) -> Implementation:
    """This product, on a GPU, by the lines that both share."""

    def linear(
        x: Float[Tensor, "tokens in"], packed: Packed, bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "tokens out"]:
        return multiply(x, packed["lines"], packed["starts"], bias, packed.shape[0])

    def why_not(packed: Packed, tokens: int) -> str | None:
        return bits.why_not(packed.shape, packed.dtype, packed.device, tokens, most_tokens)

    return Implementation(name, linear, why_not, LINES)


@dataclass(frozen=True)
class Bitmap(Format):
    """The nonzeros in row order, and a bit for every weight.

    | tensor | type | shape |
    |---|---|---|
    | `values` | the weight's | `[nonzeros]` |
    | `bitmask` | uint8 | `[out, ceil(in / 8)]` |

    Bit `b` of byte `j` of a row of `bitmask` is column `8j + b`; 1 = keep. A row starts on a byte
    of its own, and the unused bits of its last byte are zero.
    """

    name = "bitmap"
    tensors = ("values", "bitmask")
    implementations = (
        _implementation("decode", bits.multiply, bits.MOST_TOKENS),
        _implementation("expand", bits.multiply_expanded, None),
        REFERENCE,
    )
    is_exact = True

    def why_not(self, weight: Tensor) -> str | None:
        """By how much the packed weight is no smaller than the dense one, or None if it is."""
        if (problem := why_no_weight(weight, self)) is not None:
            return problem
        mask_bytes = weight.shape[0] * ((weight.shape[1] + 7) // 8)
        value_bytes = int(weight.count_nonzero()) * weight.itemsize
        return why_not_smaller(weight, self, value_bytes + mask_bytes)

    def density(self, weight: Float[Tensor, "out in"]) -> float:
        """The fraction of the weight that `pack` stores values for."""
        return int(weight.count_nonzero()) / max(1, weight.numel())

    def pack(self, weight: Tensor) -> Packed:
        """The nonzeros and their bitmask; unpacking gives `weight`, any pattern, any sparsity.

        Nonzeros come back bit for bit; -0.0 counts as zero and comes back as +0.0.

        Cost: density x dense bytes, + 1 bit a weight: 0.5625 of a 16-bit weight that is half zeros.
        Raises: ValueError if a weight is not finite.
        """
        shape = dense_shape(weight)
        keep = weight != 0
        tensors = {"values": weight[keep], "bitmask": _pack_bits(keep)}
        return Packed(self, shape, weight.dtype, tensors)

    def unpack(self, packed: Packed) -> Float[Tensor, "out in"]:
        """The dense weight.

        Cost: one dense weight, and nine bytes a weight while the bits are spread out.
        """
        dense = packed["values"].new_zeros(packed.shape)
        return dense.masked_scatter_(_unpack_bits(packed), packed["values"])

    def empty(self, shape: tuple[int, int], stored: int, dtype: torch.dtype) -> Packed:
        """Zeros of the right sizes, for a loader to fill.

        Raises: ValueError if more is stored than there are weights.
        """
        check_stored(self, shape, stored)
        bitmask = torch.zeros(shape[0], (shape[1] + 7) // 8, dtype=torch.uint8, device="cpu")
        values = torch.zeros(stored, dtype=dtype, device="cpu")
        return Packed(self, shape, dtype, {"values": values, "bitmask": bitmask})

    def why_broken(self, packed: Packed) -> str | None:
        """How bits and values disagree, or which bits stand for no weight; or None."""
        used = packed.shape[1] % 8
        if used and bool((packed["bitmask"][:, -1] >> used).any()):
            return f"bitmask keeps columns from {packed.shape[1]} on, which the weight lacks"
        bits, stored = int(_unpack_bits(packed).sum()), len(packed["values"])
        if bits != stored:
            return f"bitmask keeps {bits} weights, but {stored} values are stored"
        return None


def _pack_bits(keep: Bool[Tensor, "out in"]) -> UInt8[Tensor, "out bytes"]:
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.shape[1] % 8))
    bits: Tensor = padded.unflatten(1, (-1, 8)) << _shifts(keep)
    return bits.sum(2, dtype=torch.uint8)


def _unpack_bits(packed: Packed) -> Bool[Tensor, "out in"]:
    bits: Tensor = (packed["bitmask"].unsqueeze(2) >> _shifts(packed["bitmask"])) & 1
    keep: Tensor = bits.flatten(1)[:, : packed.shape[1]].bool()
    return keep


def _shifts(like: Tensor) -> UInt8[Tensor, " 8"]:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
