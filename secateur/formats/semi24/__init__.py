"""2:4 weights: at most two nonzeros in every four consecutive inputs, half the values stored."""

from dataclasses import dataclass
from operator import itemgetter

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats import simd, two_of_four, units
from secateur.formats.contract import Format, Implementation, Packed, dense_shape, why_no_weight
from secateur.formats.kernels.decode24 import Kind
from secateur.formats.reference import REFERENCE
from secateur.formats.semi24 import cusparselt, dense

# How `units` reads the weight: kept values as they are stored, without scales.
UNITS = (Kind.W16, False, itemgetter("values"), lambda values: values)


@dataclass(frozen=True)
class Semi24(Format):
    """Two values for every four consecutive inputs, and the columns they come from.

    | tensor | type | shape |
    |---|---|---|
    | `values` | the weight's | `[out, in / 2]` |
    | `metadata` | uint8 | `[out, ceil(in / 8)]` |

    The metadata is described in `secateur.formats.two_of_four`.
    """

    name = "semi24"
    tensors = ("values", "metadata")
    # In order of preference where nothing was measured: those that hold the weight once come first.
    implementations = (
        units.decode(*UNITS),
        units.prefill(*UNITS),
        units.expanded(*UNITS),
        simd.two_of_four(simd.stored_floats),
        Implementation(
            *("cusparselt", cusparselt.linear, cusparselt.why_not, cusparselt.BLOB), searches=True
        ),
        Implementation("dense", dense.linear, dense.why_not, dense.DENSE),
        REFERENCE,
    )
    is_exact = True
    prune_to = "2:4"

    def why_not(self, weight: Tensor) -> str | None:
        """Where the weight is not at most 2:4, or None."""
        return why_no_weight(weight, self) or two_of_four.why_not(weight, self.name)

    def density(self, weight: Float[Tensor, "out in"]) -> float:
        """The fraction of the weight that `pack` stores values for: always half."""
        return 0.5

    def pack(self, weight: Tensor) -> Packed:
        """The 2:4 weight as its kept values and their 2-bit positions; unpacking gives `weight`.

        A group with fewer than two nonzeros stores explicit zeros, so any weight that is *at most*
        2:4 packs. Nonzeros come back bit for bit; -0.0 counts as zero and comes back as +0.0.

        Cost: 0.5625 of the bytes of a 16-bit dense weight.   (8 values + 8 x 2 bits for 16 weights)
        Raises: ValueError if a group of four has more than two nonzeros, if in_features is not a
            multiple of 4, or if a weight is not finite.
        Source: PTX ISA, sparse `mma.sp` operand A; layout is ours, arranged per kernel on load.
        """
        shape = dense_shape(weight)
        metadata = two_of_four.metadata_of(weight)
        kept = two_of_four.gather(weight, metadata)
        tensors = {"values": kept.masked_fill(kept == 0, 0.0), "metadata": metadata}
        return Packed(self, shape, weight.dtype, tensors)

    def unpack(self, packed: Packed) -> Float[Tensor, "out in"]:
        """The dense weight.

        Cost: one dense weight, and eight bytes per kept value while it runs.
        """
        return two_of_four.scatter(packed["values"], packed["metadata"])

    def empty(self, shape: tuple[int, int], stored: int, dtype: torch.dtype) -> Packed:
        """Zeros of the right sizes, for a loader to fill.

        Raises: ValueError if the description is of another shape.
        """
        metadata = two_of_four.empty_metadata(shape, stored, self.name)
        values = torch.zeros(shape[0], shape[1] // 2, dtype=dtype, device="cpu")
        return Packed(self, shape, dtype, {"values": values, "metadata": metadata})

    def why_broken(self, packed: Packed) -> str | None:
        """The first group that does not name two ascending columns, or None."""
        return two_of_four.why_broken(packed["metadata"], packed.shape[1])
