"""4:8 weights: at most four nonzeros in every eight consecutive inputs, half the values stored."""

from dataclasses import dataclass
from operator import itemgetter

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats import four_of_eight, units
from secateur.formats.contract import Format, Packed, dense_shape, why_no_weight
from secateur.formats.kernels.decode24 import Kind
from secateur.formats.reference import REFERENCE

# How `units` reads the weight: kept values as they are stored, without scales.
UNITS = (Kind.W16_48, False, itemgetter("values"), lambda values: values)


@dataclass(frozen=True)
class Semi48(Format):
    """Four values for every eight consecutive inputs, and the columns they come from.

    | tensor | type | shape |
    |---|---|---|
    | `values` | the weight's | `[out, in / 2]` |
    | `metadata` | uint8 | `[out, in / 8]` |

    The metadata is described in `secateur.formats.four_of_eight`. A 2:4 weight fits as well, and
    takes as many bytes in `semi24`, which the sparse tensor cores multiply.
    """

    name = "semi48"
    tensors = ("values", "metadata")
    implementations = (units.decode(*UNITS), units.expanded(*UNITS), REFERENCE)
    is_exact = True
    prune_to = "4:8"

    def why_not(self, weight: Tensor) -> str | None:
        """Where the weight is not at most 4:8, or None."""
        return why_no_weight(weight, self) or four_of_eight.why_not(weight, self.name)

    def density(self, weight: Float[Tensor, "out in"]) -> float:
        """The fraction of the weight that `pack` stores values for: always half."""
        return 0.5

    def pack(self, weight: Tensor) -> Packed:
        """The 4:8 weight as its kept values and a bit for each weight; unpacking gives `weight`.

        A group with fewer than four nonzeros stores explicit zeros, so any weight that is *at most*
        4:8 packs. Nonzeros come back bit for bit; -0.0 counts as zero and comes back as +0.0.

        Cost: 0.5625 of the bytes of a 16-bit dense weight.   (4 values + 8 bits for 8 weights)
        Raises: ValueError if a group of eight has more than four nonzeros, if in_features is not a
            multiple of 8, or if a weight is not finite.
        """
        shape = dense_shape(weight)
        metadata = four_of_eight.metadata_of(weight)
        kept = four_of_eight.gather(weight, metadata)
        tensors = {"values": kept.masked_fill(kept == 0, 0.0), "metadata": metadata}
        return Packed(self, shape, weight.dtype, tensors)

    def unpack(self, packed: Packed) -> Float[Tensor, "out in"]:
        """The dense weight.

        Cost: one dense weight, and eight bytes per kept value while it runs.
        """
        return four_of_eight.scatter(packed["values"], packed["metadata"])

    def empty(self, shape: tuple[int, int], stored: int, dtype: torch.dtype) -> Packed:
        """Zeros of the right sizes, for a loader to fill.

        Raises: ValueError if the description is of another shape.
        """
        metadata = four_of_eight.empty_metadata(shape, stored, self.name)
        values = torch.zeros(shape[0], shape[1] // 2, dtype=dtype, device="cpu")
        return Packed(self, shape, dtype, {"values": values, "metadata": metadata})

    def why_broken(self, packed: Packed) -> str | None:
        """The first group that does not keep four columns, or None."""
        return four_of_eight.why_broken(packed["metadata"], packed.shape[1])
