"""Quantisation grids: the numbers that a weight may take, as scale x code.

A grid is passed by value: `Int4(group_size=128)`, `Int8()`, `Fp8()`; `Int3` and `Int2` are for
measuring what fewer bits cost, and no format packs them. Scales are rounded to the
weight's dtype *before* codes are chosen, so that what is stored is what was chosen for. No grid has
a zero point: a zero weight has code 0 and stays zero, as sparse formats need.

The scale of a group comes from a search. A group that already lies on the grid is recognised first:
its largest magnitude is scale x code for one of the few magnitudes that a code can have, up to one
rounding, so trying each with its two neighbours finds every such scale. Other groups take the best
of a few clips: a smaller scale cuts the largest weights off and rounds all others more finely.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

QUANTISABLE = (torch.float32, torch.bfloat16, torch.float16)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# Of a search: on a CPU its temporaries, 4 MiB each, then fit caches; on others every operation
# costs a launch, however few numbers it has.
WEIGHTS_AT_ONCE, WEIGHTS_AT_ONCE_ELSEWHERE = 2**20, 2**26
PROBED = 32  # columns of a group that are looked at before all of them are

# Clips tried, as fractions of the largest magnitude. Finer steps gain less than 0.5 % of the error,
# and below the last nothing was gained on normal and heavy-tailed weights, but for 4 bits with one
# scale for thousands of heavy-tailed weights. For 8 bits the gain is small altogether.
INT4_CLIPS = tuple(1 - step / 40 for step in range(29))  # 1.0 to 0.3
FEWER_CLIPS = tuple(1 - step / 40 for step in range(37))  # 1.0 to 0.1, for 2 and 3 bits
INT8_CLIPS = tuple(1 - step / 40 for step in range(11))  # 1.0 to 0.75
FP8_CLIPS = tuple(1 - step / 16 for step in range(8))  # 1.0 to 0.56: one power of two repeats


@dataclass(frozen=True)
class Grid:
    """The numbers that quantised weights may take: `scale x code`, a scale for each group.

    Codes are `code_dtype` numbers of at most `largest` in magnitude, `bits` each: all integers
    there, or all e4m3 floats. A group is `group_size` consecutive inputs of an output, kept or
    pruned, the last may be shorter; None is all inputs of an output. Grids with the same codes and
    groups are equal. `Int2`, `Int3`, `Int4`, `Int8` and `Fp8` make them.
    """

    name: str
    bits: int
    largest: float
    group_size: int | None
    code_dtype: torch.dtype
    clips: tuple[float, ...]  # that are tried for a scale

    def __repr__(self) -> str:
        """As it is spelt: `Int4(group_size=128)`, `Int8()`."""
        has_groups = self.bits < 8  # 8-bit grids have one scale for every output
        return f"{self.name.capitalize()}({f'group_size={self.group_size}' if has_groups else ''})"

    def nearest(self, ratios: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The nearest code of every weight / scale, as a float; of the two zeros of e4m3 +0."""
        if not self.code_dtype.is_floating_point:
            return ratios.round().clamp_(-self.largest, self.largest)
        codes = ratios.clamp(-self.largest, self.largest).to(self.code_dtype)
        return codes.to(ratios.dtype).add_(0.0)

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
        _check(weight)
        size, columns = self.group_size, weight.shape[1]
        width = max(1, columns if size is None else min(size, columns))
        bends = None if curvature is None else _grouped(curvature.float()[None], width)
        on_cpu = weight.device.type == "cpu"
        most = WEIGHTS_AT_ONCE if on_cpu else WEIGHTS_AT_ONCE_ELSEWHERE
        found = [
            _searched(self, _grouped(rows, width), bends)
            for rows in weight.detach().split(max(1, most // max(1, columns)))
        ]
        return torch.cat(found)

    def codes(
        self, weight: Float[Tensor, "out in"], scales: Float[Tensor, "out groups"]
    ) -> Shaped[Tensor, "out in"]:
        """The nearest code of every weight, in `code_dtype`.

        Raises: ValueError for weights or scales that are not finite.
        """
        return self.nearest(_ratios(weight, scales, self.group_size)).to(self.code_dtype)

    def dequantised(
        self, codes: Shaped[Tensor, "out in"], scales: Float[Tensor, "out groups"]
    ) -> Float[Tensor, "out in"]:
        """`scale x code`: exact in float32 for 16-bit scales, rounded once for float32 ones."""
        spread = _spread(scales, codes.shape[1], self.group_size)
        return codes.to(spread.dtype).mul_(spread)

    def straight_through(
        self,
        weight: Float[Tensor, "out in"],
        scales: Float[Tensor, "out groups"],
        dtype: torch.dtype,
    ) -> Float[Tensor, "out in"]:
        """The nearest `scale x code` as `dtype` stores it, in the weight's dtype, with gradients.

        Those are of rounding taken for the identity: a weight gets the gradient of the result
        unless it is beyond the largest code, a scale the sum over its group of the gradient times
        code - weight / scale, or times the code beyond the largest.

        Source: straight-through estimator, Bengio et al., arXiv:1308.3432; scales as in LSQ, Esser
            et al., arXiv:1902.08153.
        """
        spread = _as_stored(_spread(scales, weight.shape[1], self.group_size), dtype)
        ratios = (weight / spread).clamp(-self.largest, self.largest)
        codes = ratios + (self.nearest(ratios.detach()) - ratios).detach()
        return _as_stored(codes * spread, dtype)


def Int4(group_size: int | None = 128) -> Grid:
    """The grid of codes -7 to 7, a scale for every `group_size` inputs of an output, or for all.

    Symmetric: -8 is left out, so that a code is a sign and a magnitude. The groups count the
    weight's own inputs, kept or pruned; the last may be shorter.

    Raises: ValueError for a group_size below 1.
    """
    return _of_groups(4, group_size, INT4_CLIPS)


def Int3(group_size: int | None = 128) -> Grid:
    """The grid of codes -3 to 3, with scales and groups as `Int4` has them. No format packs it.

    Raises: ValueError for a group_size below 1.
    """
    return _of_groups(3, group_size, FEWER_CLIPS)


def Int2(group_size: int | None = 128) -> Grid:
    """The grid of the codes -1, 0 and 1, with scales and groups as `Int4` has them.

    Without a zero point three of the four values of 2 bits are used. No format packs it.

    Raises: ValueError for a group_size below 1.
    """
    return _of_groups(2, group_size, FEWER_CLIPS)


def Int8() -> Grid:
    """The grid of codes -127 to 127, a scale for every output."""
    return Grid("int8", 8, 127.0, None, torch.int8, INT8_CLIPS)


def Fp8() -> Grid:
    """The grid of 8-bit floats (e4m3fn: magnitudes up to 448), a scale for every output."""
    return Grid("fp8", 8, 448.0, None, torch.float8_e4m3fn, FP8_CLIPS)


def parse_grid(text: str) -> Grid:
    """The grid of a short string: `int4`, `int4:64` for groups of 64, `int4:channel`, `int8`.

    Raises: ValueError for any other text.
    """
    name, colon, group = text.partition(":")
    in_groups = {"int4": Int4, "int3": Int3, "int2": Int2}
    if name in in_groups:
        if not colon:
            return in_groups[name]()
        if group == "channel" or group.isdecimal():
            return in_groups[name](None if group == "channel" else int(group))
    if text in ("int8", "fp8"):
        return Int8() if text == "int8" else Fp8()
    raise ValueError(
        f"a grid is int4, int3, int2, int8 or fp8, got {text!r}: int4:64 has a scale for 64 "
        "inputs, int4:channel one for each output"
    )


def require_grid(grid: object, who: str) -> None:
    """Raise unless it is a grid or None; `who` takes it.

    Raises: ValueError for anything else, such as a grid's name.
    """
    if grid is not None and not isinstance(grid, Grid):
        raise ValueError(f"{who} takes a Grid, got {grid!r}: make one, such as Int4(128)")


def _of_groups(bits: int, group_size: int | None, clips: tuple[float, ...]) -> Grid:
    """The symmetric grid of integers of so few bits that groups need scales of their own."""
    name = f"int{bits}"
    if group_size is not None and group_size < 1:
        raise ValueError(
            f"{name.capitalize()} needs a group_size of at least 1, got {group_size}: "
            "pass None for one scale per output"
        )
    return Grid(name, bits, 2.0 ** (bits - 1) - 1, group_size, torch.int8, clips)


@cache
def _levels(grid: Grid) -> tuple[float, ...]:
    """Every positive magnitude of a code, the largest first."""
    if not grid.code_dtype.is_floating_point:
        return tuple(map(float, range(int(grid.largest), 0, -1)))
    bits = torch.arange(0x7E, 0, -1, dtype=torch.uint8, device="cpu")  # 0x7F is NaN
    return tuple(bits.view(grid.code_dtype).float().tolist())


def _searched(
    grid: Grid,
    grouped: Float[Tensor, "rows groups width"],
    curvature: Float[Tensor, "1 groups width"] | None,
) -> Float[Tensor, "rows groups"]:
    most = grouped.float().abs().amax(-1)
    scales, exact = _recognised(grid, grouped, most)
    rest = ~exact
    if bool(rest.any()):
        bends = None if curvature is None else curvature.expand_as(grouped)[rest]
        scales[rest] = _clipped(grid, grouped[rest], most[rest], bends)
    return scales.masked_fill_(most == 0, 1.0)


def _recognised(
    grid: Grid,
    grouped: Float[Tensor, "rows groups width"],
    most: Float[Tensor, "rows groups"],
) -> tuple[Float[Tensor, "rows groups"], Bool[Tensor, "rows groups"]]:
    """Scales of the groups that lie on the grid, and which these are.

    The largest magnitude m is scale x level for some level, rounded once, so m / level is off the
    scale by less than one unit in the last place: the scale is the nearest number or a neighbour.
    A few columns are tried first, since those of another group hardly ever agree by chance.
    """
    scales = torch.ones_like(most, dtype=grouped.dtype)
    exact = most == 0
    probed = grouped[..., :PROBED]
    for level in _levels(grid):
        for step in (0, 1, -1):
            tried = _neighbour((most / level).to(grouped.dtype), step)
            hit = ~exact & _equal(grid, probed, tried)
            if grouped.shape[-1] > PROBED and bool(hit.any()):
                hit[hit.clone()] = _equal(grid, grouped[hit], tried[hit])
            scales = torch.where(hit, tried, scales)
            exact |= hit
        if bool(exact.all()):
            break
    return scales, exact


def _clipped(
    grid: Grid,
    groups: Float[Tensor, "groups width"],
    most: Float[Tensor, " groups"],
    curvature: Float[Tensor, "groups width"] | None,
) -> Float[Tensor, " groups"]:
    """The best of the clips, the first one if several are."""
    wide = groups.float()
    best = torch.full_like(most, torch.inf)
    scales = torch.ones_like(most, dtype=groups.dtype)
    for clip in grid.clips:
        tried = _neighbour((most * clip / grid.largest).to(groups.dtype), 0)
        s = tried.float()[:, None]
        errors = (grid.nearest(wide / s) * s - wide).square_()
        error = errors.sum(-1) if curvature is None else (errors * curvature).sum(-1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, tried, scales)
    return scales


def _equal(grid: Grid, groups: Tensor, scales: Tensor) -> Tensor:
    """Whether each group is scale x code, rounded to its dtype, bit for bit but for zeros' sign."""
    s = scales.float()[..., None]
    return ((grid.nearest(groups.float() / s) * s).to(groups.dtype) == groups).all(-1)


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


def _as_stored(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers rounded to the dtype, with the gradients of what they were."""
    return wide + (wide.detach().to(dtype).to(wide.dtype) - wide).detach()


def _ratios(weight: Tensor, scales: Tensor, group_size: int | None) -> Tensor:
    _check(weight)
    if not bool(scales.isfinite().all()):
        row, group = divmod(int((~scales.isfinite()).flatten().int().argmax()), scales.shape[1])
        raise ValueError(
            f"codes need finite scales, that of row {row} group {group} is {scales[row, group]}: "
            "take those that the grid's scales(weight) gives"
        )
    return weight.float() / _spread(scales, weight.shape[1], group_size).float()


def _check(weight: Tensor) -> None:
    if weight.dtype not in QUANTISABLE:
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
