"""The layers of a model as they are: their zeros, and the patterns that they hold or could."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from secateur.core.coverage import coverage, left_alone
from secateur.core.shown import Shown, Table
from secateur.core.weights import require_data, require_module, why_computed, why_not_ordinary
from secateur.core.wrappers import unwrapped
from secateur.formats import SparseLinear
from secateur.model import layers as _layers
from secateur.model.piece import kind_of, parameter_name
from secateur.patterns import NM, Block, Pattern

# The patterns that hardware or a kernel here can use, for which zeros are tested.
GROUPS = (NM(1, 4), NM(2, 4), NM(4, 8))
TILES = (64, 32, 16)


@dataclass(frozen=True)
class LayerInspection:
    """One layer's weight as it is.

    `holds` are the patterns of `GROUPS` that its zeros satisfy already, with `@pad-remainder` if
    they do not divide its inputs (a convolution's channels); `fits` are the patterns and the tile
    sizes that its shape allows. `zero_tiles` is the share of tiles that are entirely zero, by size.
    `skipped` says why `plan` would leave the layer alone or no verb can change it, and is else
    empty; `named` layers are of a kind that is pruned by name only. `packed` layers hold their
    zeros in a format, and have to be unpacked before they are pruned. The weight of a `computed`
    layer is made by something, such as a mask of torch.nn.utils.prune, that has to be removed
    before.
    """

    layer: str
    kind: str
    shape: tuple[int, int]
    dtype: str
    zeros: float
    holds: tuple[str, ...]
    fits: tuple[str, ...]
    zero_tiles: Mapping[str, float]
    zero_rows: int
    zero_columns: int
    skipped: str
    named: bool
    packed: bool
    computed: bool

    @property
    def counted(self) -> bool:
        """Whether its zeros count: it can be pruned, or is packed or computed."""
        return self.packed or self.computed or not self.skipped


@dataclass(frozen=True)
class Inspection(Shown):
    """What `inspect` found, layer by layer, in the model's order.

    `left` says how many other parameters there are, by the reason why no layer has them.
    """

    layers: tuple[LayerInspection, ...]
    left: Mapping[str, int] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        return (
            "layer", "out", "in", "dtype", "zeros", "holds", "does not fit", "zero tiles",
            "zero rows", "zero columns", "left alone",
        )  # fmt: skip

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                r.layer,
                *map(str, r.shape),
                r.dtype,
                f"{r.zeros:.1%}",
                " ".join(r.holds) or "-",
                " ".join(name for name in _names() if name not in r.fits) or "-",
                _largest_tiles(r.zero_tiles),
                str(r.zero_rows or "-"),
                str(r.zero_columns or "-"),
                r.skipped or "-",
            )
            for r in self.layers
        ]

    @property
    def zeros(self) -> float:
        """The share of zeros among the weights that can be pruned, are packed or computed."""
        sizes = [r.shape[0] * r.shape[1] for r in self.layers if r.counted]
        zeros = [r.zeros for r in self.layers if r.counted]
        return sum(n * z for n, z in zip(sizes, zeros, strict=True)) / max(sum(sizes), 1)

    @property
    def summary(self) -> str:
        """The totals: layers that can be pruned, their weights and zeros, and their patterns."""
        chosen = [r for r in self.layers if r.counted]
        packed, computed = sum(r.packed for r in chosen), sum(r.computed for r in chosen)
        of = sum(r.counted or not r.named for r in self.layers)
        many = f"{len(chosen) - packed - computed} of {of} layers can be pruned"
        many += f", {packed} are packed" if packed else ""
        many += f", {computed} compute their weight" if computed else ""
        weights = sum(r.shape[0] * r.shape[1] for r in chosen)
        held = [name for name in _names() if chosen and all(name in r.holds for r in chosen)]
        fitting = [name for name in _names() if chosen and all(name in r.fits for r in chosen)]
        told = f"; all of them hold {', '.join(held)}" if held else ""
        told += f"; the shapes of all fit {', '.join(fitting)}" if fitting else ""
        share = f"; {coverage('these are', weights, self.left)}" if self.left else ""
        return f"{many}: {weights:,} weights, {self.zeros:.1%} zeros{told}{share}"

    @property
    def paragraphs(self) -> tuple[str | Table, ...]:
        return Table(self.columns, self.rows()), self.summary

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def inspect(model: nn.Module) -> Inspection:
    """Every layer whose weight could be pruned: its shape and dtype, its zeros and their patterns.

    Reads the weights and changes nothing. Packed layers are read as the dense weight they hold.

    Cost: one dense mask at a time.
    Raises:
        ValueError: if the model has no layer to prune, or weights without data.
    """
    require_module(model)
    model = unwrapped(model)
    modules = _layers.layers_of(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no linear, convolution or embedding layer")
    require_data({n: m for n, m in modules.items() if not why_computed(m)})
    skipped = _skipped(model, modules)
    with torch.no_grad():
        layers = tuple(_inspect(n, m, skipped.get(n, "")) for n, m in modules.items())
    covered: Counter[str] = Counter()
    for layer in layers:
        if layer.counted:
            covered[parameter_name(layer.layer, modules[layer.layer])] += prod(layer.shape)
    return Inspection(layers, left_alone(model, covered, skipped))


def _inspect(name: str, module: nn.Module, skipped: str) -> LayerInspection:
    weight = _layers.matrix(module)
    mask = weight != 0
    rows, columns = mask.shape
    shape = (rows, columns)
    packed = isinstance(module, SparseLinear)
    return LayerInspection(
        layer=name,
        kind=kind_of(module),
        shape=shape,
        dtype=str(weight.dtype).removeprefix("torch."),
        zeros=int((~mask).sum()) / max(mask.numel(), 1),
        holds=tuple(_held(module, mask)) if mask.numel() else (),
        fits=tuple(
            name
            for name, pattern in _named_patterns()
            if _layers.pattern_for(module, pattern).why_not(shape) is None
        ),
        zero_tiles={
            f"{size}x{size}": _zero_tiles(mask, size)
            for size in TILES
            if mask.numel() and Block(size, size, 0.0).why_not(shape) is None
        },
        zero_rows=int((~mask.any(1)).sum()),
        zero_columns=int((~mask.any(0)).sum()),
        skipped=skipped,
        named=not _layers.by_default(name, module),
        packed=packed,
        computed=not packed and why_computed(module) is not None,
    )


def _held(module: nn.Module, mask: Bool[Tensor, "out in"]) -> Iterator[str]:
    """The patterns of `GROUPS` that the zeros satisfy, if they need any zeros here."""
    rows, columns = mask.shape
    for group in GROUPS:
        if _layers.pattern_for(module, group).why_not((rows, columns)) is not None:
            group = replace(group, remainder="pad")
        pattern = _layers.pattern_for(module, group)
        asks = pattern.violation(mask.new_ones(1, columns)) is not None
        if asks and pattern.violation(mask) is None:
            yield str(group)


def _skipped(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why `plan` would leave a layer alone by default or no verb can change it, by name."""
    reasons = {
        name: "packed: unpack_ it first"
        if isinstance(module, SparseLinear)
        else f"its weight {reason}"
        for name, module in modules.items()
        if (reason := why_not_ordinary(module))
    }
    selection = _layers.select_any(model, [lambda name, module: True])
    for name, module in selection.layers.items():
        if not _layers.by_default(name, module):
            reasons.setdefault(name, f"{type(module).__name__}: name it to prune it")
    return {**selection.skipped, **reasons}


def _zero_tiles(mask: Bool[Tensor, "out in"], size: int) -> float:
    """The share of tiles of size x size without a kept weight; the size divides the shape."""
    tiles = mask.unflatten(1, (-1, size)).unflatten(0, (-1, size))
    return float((~tiles.any(3).any(1)).float().mean())


def _named_patterns() -> list[tuple[str, Pattern]]:
    groups: list[tuple[str, Pattern]] = [(str(p), p) for p in GROUPS]
    return groups + [(f"{size}x{size}", Block(size, size, 0.0)) for size in TILES]


def _names() -> list[str]:
    return [name for name, _ in _named_patterns()]


def _largest_tiles(shares: Mapping[str, float]) -> str:
    """The share of zero tiles at the largest size that has any, which implies the smaller ones."""
    return next((f"{share:.1%} of {size}" for size, share in shares.items() if share > 0), "-")
