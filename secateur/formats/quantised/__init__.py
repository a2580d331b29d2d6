"""Weights rounded to a grid, all or the kept ones of 2:4 or 4:8; inputs are rounded if asked."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats.contract import Implementation, Packed, dense_shape, why_no_weight
from secateur.formats.positions import POSITIONS
from secateur.formats.quantised import (
    codes,
    cusparselt,
    on_units,
    prefill,
    reference,
    simd,
    torch_fp8,
    torch_int8,
)
from secateur.patterns import NM
from secateur.patterns.grids import QUANTISABLE, Fp8, Grid, Int4, Int8

TWO_OF_FOUR, FOUR_OF_EIGHT = NM(2, 4), NM(4, 8)
GROUP_SIZE = 128  # inputs, kept or not, that share a scale, where a row has several


@dataclass(frozen=True)
class Quantised:
    """The weight rounded to `grid`, and the codes that its pattern keeps: all, 2:4 or 4:8.

    | tensor | type | shape |
    |---|---|---|
    | `values` | codes, see `codes.py` | `[out, kept codes]`, of 4 bits half as many bytes |
    | `metadata` | uint8, see `two_of_four.py` | `[out, ceil(in / 8)]`, of a pattern alone |
    | `scales` | the weight's | `[out, 1]`, or `[out, ceil(in / 128)]` for groups |

    With `rounds_inputs` the linear rounds each token to 8-bit codes, too, with a scale of its own
    (`dynamic.py`), and multiplies codes.

    Raises: ValueError for codes of other than 4 or 8 bits, another pattern than 2:4 and 4:8,
        another group_size than 128 or None, and groups where inputs are rounded.
    """

    grid: Grid
    pattern: NM | None = None
    rounds_inputs: bool = False
    implementations: tuple[Implementation, ...] = field(init=False, repr=False, compare=False)

    is_exact = False
    prune_to = ""

    def __post_init__(self) -> None:
        if self.grid.bits not in (4, 8):
            raise ValueError(
                f"a quantised format stores codes of 4 or 8 bits, got {self.grid!r}: pass Int4(), "
                "Int8() or Fp8()"
            )
        if self.pattern is not None and self.pattern not in POSITIONS:
            raise ValueError(
                f"a quantised format stores every weight, 2:4 or 4:8, got {self.pattern}: "
                "pass pattern=None, NM(2, 4) or NM(4, 8)"
            )
        if self.grid.group_size not in (None, GROUP_SIZE):
            raise ValueError(
                f"{self.name} needs a group_size of {GROUP_SIZE}, or None for one scale per "
                f"output, got {self.grid.group_size}: pass a grid with one of them"
            )
        if self.rounds_inputs and self.grid.group_size is not None:
            raise ValueError(
                f"{self.name} needs one scale per output, got one for every "
                f"{self.grid.group_size} inputs: pass a grid with group_size=None"
            )
        what = self.grid, self.pattern, self.rounds_inputs
        able = (  # in order of preference where nothing was measured
            prefill.implementation(*what),
            *on_units.implementations(*what),
            *(file.implementation(*what) for file in (simd, cusparselt, torch_int8, torch_fp8)),
            reference.implementation(*what),
        )
        object.__setattr__(self, "implementations", tuple(filter(None, able)))

    def __reduce__(self) -> tuple[type["Quantised"], tuple[Grid, NM | None, bool]]:
        """What it was made from: its implementations are code, which no pickle holds."""
        return Quantised, (self.grid, self.pattern, self.rounds_inputs)

    @property
    def name(self) -> str:
        """`semi24_int8_dynamic`, for example."""
        kept = "" if self.pattern is None else f"semi{self.pattern.n}{self.pattern.m}_"
        return f"{kept}{self.grid.name}{'_dynamic' if self.rounds_inputs else ''}"

    def __str__(self) -> str:
        has_one_scale = self.grid.bits < 8 and self.grid.group_size is None
        return f"{self.name}:channel" if has_one_scale else self.name

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of what is stored."""
        return ("values", "scales") if self.pattern is None else ("values", "metadata", "scales")

    def why_not(self, weight: Tensor) -> str | None:
        """Why the weight cannot be quantised or does not fit the pattern, or None."""
        problem = why_no_weight(weight, self) or self._why_not_quantisable(weight)
        if problem is None and self.pattern is not None:
            return POSITIONS[self.pattern].why_not(weight, self.name)
        return problem

    def density(self, weight: Float[Tensor, "out in"]) -> float:
        """The fraction of the weight that `pack` stores codes for: half of 2:4 and of 4:8."""
        return 1.0 if self.pattern is None else 0.5

    def pack(self, weight: Tensor) -> Packed:
        """The weight rounded to the grid: lossy, unless it lies on that grid already.

        The scales are those that lose least, see `Grid.scales`. A weight that has been unpacked, or
        reconstructed with the same `grid`, lies on the grid and comes back bit for bit. (Not
        promised where its scale or a product underflows the dtype.)

        Cost: a code for each weight, or for half of them and 0.125 bytes a weight with a pattern,
            and the scales. In parts of a 16-bit weight: 0.5 for 8-bit codes, 0.3125 with a pattern;
            0.195 for 4-bit codes with one and groups of 128. (8 codes x 4 bits + 8 x 2 bits for 16
            weights, 16 bits for 128)
        Raises: ValueError if a weight is not finite, for a float64 weight, and for a pattern if a
            group has more nonzeros than it keeps or is not whole.
        """
        shape = dense_shape(weight)
        if (problem := self._why_not_quantisable(weight)) is not None:
            raise ValueError(f"pack {problem}")
        positions = None if self.pattern is None else POSITIONS[self.pattern]
        found = {} if positions is None else {"metadata": positions.metadata_of(weight)}
        scales = self.grid.scales(weight)
        kept = self.grid.codes(weight, scales)
        if positions is not None:
            bits = positions.gather(kept.view(torch.uint8), found["metadata"])
            kept = bits.view(kept.dtype)
        values = codes.stored(self.grid, kept)
        return self._packed(shape, {"values": values, **found, "scales": scales})

    def unpack(self, packed: Packed) -> Float[Tensor, "out in"]:
        """The dense weight as scale x code, in float32: exact for 16-bit scales.

        Cost: one dense weight in float32, and for a pattern eight bytes per kept code meanwhile.
        """
        every = codes.codes_of(self.grid, self.pattern, packed)
        return self.grid.dequantised(every, packed["scales"])

    def empty(self, shape: tuple[int, int], stored: int, dtype: torch.dtype) -> Packed:
        """Zeros of the right sizes, for a loader to fill.

        Raises: ValueError if the description is of another shape.
        """
        rows, width = shape
        groups = 1 if self.grid.group_size is None else -(-width // self.grid.group_size)
        scales = torch.zeros(rows, groups, dtype=dtype, device="cpu")
        if self.pattern is not None:
            metadata = POSITIONS[self.pattern].empty_metadata(shape, stored, self.name)
            values = codes.empty(self.grid, rows, width // 2)
            tensors = {"values": values, "metadata": metadata, "scales": scales}
            return self._packed(shape, tensors)
        if stored != rows:
            raise ValueError(
                f"{self.name} needs {rows} rows of codes, got {stored}: "
                "the description is damaged, save the model again"
            )
        values = codes.empty(self.grid, rows, width)
        return self._packed(shape, {"values": values, "scales": scales})

    def why_broken(self, packed: Packed) -> str | None:
        """What is wrong with positions, codes or scales, or None if `pack` could make them."""
        problem = None
        if self.pattern is not None:
            problem = POSITIONS[self.pattern].why_broken(packed["metadata"], packed.shape[1])
        return problem or codes.why_broken(self.grid, self.pattern, packed)

    def like(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> "Quantised":
        """The format of this name that has these tensors, which tell whether there are groups.

        Where one group holds all inputs, the format with groups has the same tensors and is it.
        Scales of groups can be arranged among the codes, those of rows are always there.
        """
        if self.grid.bits == 8 or self.rounds_inputs:
            return self
        scales = tensors.get("scales")
        has_one_scale = scales is not None and scales.shape[1] == 1 and shape[1] > GROUP_SIZE
        size = None if has_one_scale else GROUP_SIZE
        return self if size == self.grid.group_size else _with_groups(self, size)

    def _packed(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Packed:
        return Packed(self.like(shape, tensors), shape, tensors["scales"].dtype, tensors)

    def _why_not_quantisable(self, weight: Tensor) -> str | None:
        if weight.dtype in QUANTISABLE:
            return None
        return (
            f"into {self.name} needs a float32, bfloat16 or float16 weight, got {weight.dtype}: "
            "scale x code is computed in float32, cast the layer with .float() first"
        )


@cache  # an operator asks at every call
def _with_groups(format: Quantised, size: int | None) -> Quantised:
    return replace(format, grid=replace(format.grid, group_size=size))


# Those that have a use, and so a name that can be typed.
FORMATS = (
    Quantised(Int4(), TWO_OF_FOUR),
    Quantised(Int4(None), TWO_OF_FOUR),
    Quantised(Int8(), TWO_OF_FOUR),
    Quantised(Fp8(), TWO_OF_FOUR),
    Quantised(Int4(), FOUR_OF_EIGHT),
    Quantised(Int4(None), FOUR_OF_EIGHT),
    Quantised(Int4()),
    Quantised(Int4(None)),
    Quantised(Int8()),
    Quantised(Int8(), TWO_OF_FOUR, rounds_inputs=True),
    Quantised(Fp8(), TWO_OF_FOUR, rounds_inputs=True),
    Quantised(Int8(), rounds_inputs=True),
    Quantised(Fp8(), rounds_inputs=True),
)
