"""Quantisation grids: the numbers that a weight may take, as scale x code.

A grid is passed by value: `Int4(group_size=128)`, `Int8()`, `Fp8()`. Scales are rounded to the
weight's dtype *before* codes are chosen, so that what is stored is what was chosen for. No grid has
a zero point: a zero weight has code 0 and stays zero, as sparse formats need.

The scale of a group comes from a search. A group that already lies on the grid is recognised first:
its largest magnitude is scale x code for one of the few magnitudes that a code can have, up to one
rounding, so trying each with its two neighbours finds every such scale. Other groups take the best
of a few clips: a smaller scale cuts the largest weights off and rounds all others more finely.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# Of a search: on a CPU its temporaries, 4 MiB each, then fit caches; on others every operation
# costs a launch, however few numbers it has.
WEIGHTS_AT_ONCE, WEIGHTS_AT_ONCE_ELSEWHERE = 2**20, 2**26
PROBED = 32  # columns of a group that are looked at before all of them are

# Clips tried, as fractions of the largest magnitude. Finer steps gain less than 0.5 % of the error,
# and below the last nothing was gained on normal and heavy-tailed weights, but for 4 bits with one
# scale for thousands of heavy-tailed weights. For 8 bits the gain is small altogether.
INT4_CLIPS = tuple(1 - step / 40 for step in range(29))  # 1.0 to 0.3
INT8_CLIPS = tuple(1 - step / 40 for step in range(11))  # 1.0 to 0.75
FP8_CLIPS = tuple(1 - step / 16 for step in range(8))  # 1.0 to 0.56: one power of two repeats

Nearest = Callable[[Tensor], Tensor]


@runtime_checkable
class Grid(Protocol):
    """The numbers that quantised weights may take: `scale x code`, a scale for each group."""

    @property
    def group_size(self) -> int | None:
        """Consecutive inputs of an output that share a scale; None for all of them."""
        ...

    def scales(
        self, weight: Float[Tensor, "out in"], curvature: Float[Tensor, " in"] | None = None
    ) -> Float[Tensor, "out groups"]:
        """The scales, in the weight's dtype, that lose least of it.

        Less is a smaller sum of squared errors, each times the `curvature` of its input where that
        is given. A weight that lies on the grid gets scales that lose nothing, and an all-zero
        group the scale 1.

        Raises: ValueError for a weight that is not finite, or of another dtype than float32,
            bfloat16 and float16.
        """
        ...

    def codes(
        self, weight: Float[Tensor, "out in"], scales: Float[Tensor, "out groups"]
    ) -> Shaped[Tensor, "out in"]:
        """The nearest code of every weight.

        Raises: ValueError for weights or scales that are not finite.
        """
        ...

    def dequantised(
        self, codes: Shaped[Tensor, "out in"], scales: Float[Tensor, "out groups"]
    ) -> Float[Tensor, "out in"]:
        """`scale x code`: exact in float32 for 16-bit scales, rounded once for float32 ones."""
        ...


@dataclass(frozen=True)
class Int4:
    """Codes -7 to 7, a scale for every `group_size` consecutive inputs of an output, or for all.

    Symmetric: -8 is left out, so that a code is a sign and a magnitude. The groups count the
    weight's own inputs, kept or pruned; the last may be shorter.
    """

    group_size: int | None = 128

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(
                f"Int4 needs a group_size of at least 1, got {self.group_size}: "
                "pass None for one scale per output"
            )

    def scales(
        self, weight: Float[Tensor, "out in"], curvature: Float[Tensor, " in"] | None = None
    ) -> Float[Tensor, "out groups"]:
        """The scales that lose least of the weight; see `Grid.scales`."""
        levels = tuple(map(float, range(7, 0, -1)))
        return _scales(weight, curvature, self.group_size, levels, INT4_CLIPS, _nearest_int4)

    def codes(
        self, weight: Float[Tensor, "out in"], scales: Float[Tensor, "out groups"]
    ) -> Shaped[Tensor, "out in"]:
        """The nearest code of every weight, as int8."""
        return _nearest_int4(_ratios(weight, scales, self.group_size)).to(torch.int8)

    def dequantised(
        self, codes: Shaped[Tensor, "out in"], scales: Float[Tensor, "out groups"]
    ) -> Float[Tensor, "out in"]:
        """`scale x code`; see `Grid.dequantised`."""
        return _products(codes, scales, self.group_size)


@dataclass(frozen=True)
class Int8:
    """Codes -127 to 127, a scale for every output."""

    @property
    def group_size(self) -> None:
        """None: one scale for all inputs of an output."""
        return None

    def scales(
        self, weight: Float[Tensor, "out in"], curvature: Float[Tensor, " in"] | None = None
    ) -> Float[Tensor, "out groups"]:
        """The scales that lose least of the weight; see `Grid.scales`."""
        levels = tuple(map(float, range(127, 0, -1)))
        return _scales(weight, curvature, None, levels, INT8_CLIPS, _nearest_int8)

    def codes(
        self, weight: Float[Tensor, "out in"], scales: Float[Tensor, "out groups"]
    ) -> Shaped[Tensor, "out in"]:
        """The nearest code of every weight, as int8."""
        return _nearest_int8(_ratios(weight, scales, None)).to(torch.int8)

    def dequantised(
        self, codes: Shaped[Tensor, "out in"], scales: Float[Tensor, "out groups"]
    ) -> Float[Tensor, "out in"]:
        """`scale x code`; see `Grid.dequantised`."""
        return _products(codes, scales, None)


@dataclass(frozen=True)
class Fp8:
    """Codes that are 8-bit floats (e4m3fn: magnitudes up to 448), a scale for every output."""

    @property
    def group_size(self) -> None:
        """None: one scale for all inputs of an output."""
        return None

    def scales(
        self, weight: Float[Tensor, "out in"], curvature: Float[Tensor, " in"] | None = None
    ) -> Float[Tensor, "out groups"]:
        """The scales that lose least of the weight; see `Grid.scales`."""
        return _scales(weight, curvature, None, _fp8_levels(), FP8_CLIPS, _nearest_fp8)

    def codes(
        self, weight: Float[Tensor, "out in"], scales: Float[Tensor, "out groups"]
    ) -> Shaped[Tensor, "out in"]:
        """The nearest code of every weight, as float8_e4m3fn; zeros are +0."""
        return _nearest_fp8(_ratios(weight, scales, None)).to(torch.float8_e4m3fn)

    def dequantised(
        self, codes: Shaped[Tensor, "out in"], scales: Float[Tensor, "out groups"]
    ) -> Float[Tensor, "out in"]:
        """`scale x code`; see `Grid.dequantised`."""
        return _products(codes, scales, None)


def _nearest_int4(ratios: Tensor) -> Tensor:
    return ratios.round().clamp_(-7, 7)


def _nearest_int8(ratios: Tensor) -> Tensor:
    return ratios.round().clamp_(-127, 127)


def _nearest_fp8(ratios: Tensor) -> Tensor:
    """e4m3 values; adding zero makes -0 a +0."""
    return ratios.clamp(-448, 448).to(torch.float8_e4m3fn).to(ratios.dtype).add_(0.0)


def _fp8_levels() -> tuple[float, ...]:
    """Every positive magnitude of e4m3fn, the largest first; 0x7F is NaN."""
    bits = torch.arange(0x7E, 0, -1, dtype=torch.uint8, device="cpu")
    return tuple(bits.view(torch.float8_e4m3fn).float().tolist())


def _scales(
    weight: Tensor,
    curvature: Tensor | None,
    group_size: int | None,
    levels: tuple[float, ...],
    clips: tuple[float, ...],
    nearest: Nearest,
) -> Float[Tensor, "out groups"]:
    """The search, some rows at a time."""
    _check(weight)
    width = max(1, weight.shape[1] if group_size is None else min(group_size, weight.shape[1]))
    bends = None if curvature is None else _grouped(curvature.float()[None], width)
    on_cpu = weight.device.type == "cpu"
    most = WEIGHTS_AT_ONCE if on_cpu else WEIGHTS_AT_ONCE_ELSEWHERE
    found = [
        _searched(_grouped(rows, width), bends, levels, clips, nearest)
        for rows in weight.detach().split(max(1, most // max(1, weight.shape[1])))
    ]
    return torch.cat(found)


def _searched(
    grouped: Float[Tensor, "rows groups width"],
    curvature: Float[Tensor, "1 groups width"] | None,
    levels: tuple[float, ...],
    clips: tuple[float, ...],
    nearest: Nearest,
) -> Float[Tensor, "rows groups"]:
    most = grouped.float().abs().amax(-1)
    scales, exact = _recognised(grouped, most, levels, nearest)
    rest = ~exact
    if bool(rest.any()):
        bends = None if curvature is None else curvature.expand_as(grouped)[rest]
        scales[rest] = _clipped(grouped[rest], most[rest], bends, levels[0], clips, nearest)
    return scales.masked_fill_(most == 0, 1.0)


def _recognised(
    grouped: Float[Tensor, "rows groups width"],
    most: Float[Tensor, "rows groups"],
    levels: tuple[float, ...],
    nearest: Nearest,
) -> tuple[Float[Tensor, "rows groups"], Bool[Tensor, "rows groups"]]:
    """Scales of the groups that lie on the grid, and which these are.

    The largest magnitude m is scale x level for some level, rounded once, so m / level is off the
    scale by less than one unit in the last place: the scale is the nearest number or a neighbour.
    A few columns are tried first, since those of another group hardly ever agree by chance.
    """
    scales = torch.ones_like(most, dtype=grouped.dtype)
    exact = most == 0
    probed = grouped[..., :PROBED]
    for level in levels:
        for step in (0, 1, -1):
            tried = _neighbour((most / level).to(grouped.dtype), step)
            hit = ~exact & _equal(probed, tried, nearest)
            if grouped.shape[-1] > PROBED and bool(hit.any()):
                hit[hit.clone()] = _equal(grouped[hit], tried[hit], nearest)
            scales = torch.where(hit, tried, scales)
            exact |= hit
        if bool(exact.all()):
            break
    return scales, exact


def _clipped(
    groups: Float[Tensor, "groups width"],
    most: Float[Tensor, " groups"],
    curvature: Float[Tensor, "groups width"] | None,
    largest: float,
    clips: tuple[float, ...],
    nearest: Nearest,
) -> Float[Tensor, " groups"]:
    """The best of the clips; of equals the first."""
    wide = groups.float()
    best = torch.full_like(most, torch.inf)
    scales = torch.ones_like(most, dtype=groups.dtype)
    for clip in clips:
        tried = _neighbour((most * clip / largest).to(groups.dtype), 0)
        s = tried.float()[:, None]
        errors = (nearest(wide / s) * s - wide).square_()
        error = errors.sum(-1) if curvature is None else (errors * curvature).sum(-1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, tried, scales)
    return scales


def _equal(groups: Tensor, scales: Tensor, nearest: Nearest) -> Tensor:
    """Whether each group is scale x code, rounded to its dtype, bit for bit but for zeros' sign."""
    s = scales.float()[..., None]
    return ((nearest(groups.float() / s) * s).to(groups.dtype) == groups).all(-1)


def _neighbour(scales: Tensor, step: int) -> Tensor:
    """The positive finite number `step` places up; never zero, never infinite."""
    bits = scales.view(BITS[scales.dtype])
    largest = torch.tensor(torch.finfo(scales.dtype).max, dtype=scales.dtype, device="cpu").view(
        bits.dtype
    )
    return (bits + step).clamp_(1, int(largest)).view(scales.dtype)


def _grouped(weight: Tensor, width: int) -> Tensor:
    """[rows, groups, width], the last group filled up with zeros."""
    missing = -weight.shape[1] % width
    grouped: Tensor = torch.nn.functional.pad(weight, (0, missing)).unflatten(1, (-1, width))
    return grouped


def _spread(scales: Tensor, columns: int, group_size: int | None) -> Tensor:
    """The scale of every weight, in float32 at least; of one column where a row has one scale."""
    wide = scales.to(torch.promote_types(scales.dtype, torch.float32))
    if scales.shape[1] == 1:
        return wide
    assert group_size is not None, "one scale per output means one column of scales"
    return wide.repeat_interleave(group_size, dim=1)[:, :columns]


def _ratios(weight: Tensor, scales: Tensor, group_size: int | None) -> Tensor:
    _check(weight)
    if not bool(scales.isfinite().all()):
        row, group = divmod(int((~scales.isfinite()).flatten().int().argmax()), scales.shape[1])
        raise ValueError(
            f"codes need finite scales, that of row {row} group {group} is {scales[row, group]}: "
            "take those that the grid's scales(weight) gives"
        )
    return weight.float() / _spread(scales, weight.shape[1], group_size).float()


def _products(codes: Tensor, scales: Tensor, group_size: int | None) -> Tensor:
    spread = _spread(scales, codes.shape[1], group_size)
    return codes.to(spread.dtype).mul_(spread)


def _check(weight: Tensor) -> None:
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"a grid needs a float32, bfloat16 or float16 weight, got {weight.dtype}: scale x code "
            "is computed in float32, cast the weight with .float() first"
        )
    finite = weight.isfinite()
    if not bool(finite.all()):
        row, column = divmod(int((~finite).flatten().int().argmax()), weight.shape[1])
        raise ValueError(
            f"a grid needs finite weights, row {row} column {column} is {weight[row, column]}: "
            "repair the checkpoint or the training run that made it"
        )
