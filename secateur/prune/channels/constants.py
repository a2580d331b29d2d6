"""What layers read of channels that are to be removed: a constant, which their biases can take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, fx

from secateur.prune.channels.channels import Followed, Removed
from secateur.prune.channels.flow import Reader, argument, operation
from secateur.prune.channels.rules import is_mean_of_squares
from secateur.prune.channels.units import Ids


def constants(
    followed: Followed, values: Mapping[str, Tensor], removed: Removed
) -> tuple[dict[str, Float[Tensor, " out"]], dict[int, str]]:
    """Bias -> what is added to it so that the layer's output is the same without the channels.

    The masked model, whose parameters and buffers are `values`, is run on the batch that it was
    exported with, and what arrives of the removed channels is looked at. Statistics of LayerNorm
    and RMSNorm are those of the channels that are left. Then the units that have to stay, because
    what arrives is no constant, or a layer cannot take it, with the reason; with such, the run is
    to be repeated without their removal.
    """
    run = _Masked(followed, removed)
    with torch.no_grad():
        run.run(*followed.trace.arguments(values))
    added: dict[str, Tensor] = {}
    held: dict[int, str] = {}
    for reader in followed.readers:
        found = run.seen.get((reader.source, reader.dim))
        if found is None:
            continue
        columns, needed = _columns(reader, values, found)
        reason = _why_held(reader, added, columns, needed)
        layer = reader.layer or "the model itself"
        for i, unit in enumerate(found.units.tolist()):
            if found.varies[i]:
                held.setdefault(unit, f"{layer} reads them, and what it reads depends on the input")
            elif needed[i] and reason:
                held.setdefault(unit, f"{layer} reads them, and {reason}")
        if needed.any() and reason is None:
            added[cast(str, reader.bias)] = columns.sum(1)
    return added, held


def removable(
    followed: Followed, values: Mapping[str, Tensor], removed: Removed
) -> tuple[Removed, dict[str, Float[Tensor, " out"]], dict[int, str]]:
    """Of the units to be removed those that can be, the constants, and why the others stay."""
    held: dict[int, str] = {}
    removed = removed.copy()
    while True:
        added, more = constants(followed, values, removed)
        if not more:
            return removed, added, held
        held |= more
        removed[list(more)] = False


@dataclass(frozen=True)
class _Seen:
    """What arrives of removed channels: their indices and units, and what they are."""

    index: Int[Tensor, " removed"]
    units: Ids
    constant: Float[Tensor, " removed"]
    varies: Bool[Tensor, " removed"]


def _columns(
    reader: Reader, values: Mapping[str, Tensor], seen: _Seen
) -> tuple[Float[Tensor, "out removed"], Bool[Tensor, " removed"]]:
    """What each channel adds to the layer's output, and whether that is anything."""
    if reader.zero is not None or reader.weight is None:
        return seen.constant[None], seen.constant != 0
    weight = values[reader.weight].movedim(reader.columns, 1)
    by_channel = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    columns = by_channel.index_select(1, seen.index) * seen.constant
    return columns, (columns != 0).any(0)


def _why_held(
    reader: Reader, added: Mapping[str, Tensor], columns: Tensor, needed: Tensor
) -> str | None:
    """Why the layer cannot take the constants, or None."""
    if not needed.any():
        return None
    if reader.zero is not None:
        return reader.zero
    if reader.bias is None:
        return "it has no bias to take the constant that they are"
    if reader.bias in added and not torch.allclose(added[reader.bias], columns.sum(1)):
        return "it is called several times, with other constants"
    return None


class _Masked(fx.Interpreter):
    """Runs the masked model and keeps what readers read of channels that are removed."""

    def __init__(self, followed: Followed, removed: Removed) -> None:
        super().__init__(followed.trace.graph)
        self._followed, self._removed = followed, removed
        self._wanted = {(reader.source, reader.dim) for reader in followed.readers}
        self.seen: dict[tuple[str, int], _Seen] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = self._normalised(n)
        result = super().run_node(n) if result is None else result
        parts = enumerate(result) if isinstance(result, (list, tuple)) else ()
        for name, value in [(n.name, result), *((f"{n.name}[{i}]", r) for i, r in parts)]:
            for source, dim in self._wanted:
                if source == name:
                    self._look(name, dim, value)
        return result

    def _look(self, name: str, dim: int, value: Tensor) -> None:
        ids = self._along(name, dim)
        if ids is None or not (gone := self._removed[ids]).any():
            return
        index = torch.from_numpy(np.flatnonzero(gone)).to(value.device)
        arrived = value.index_select(dim, index).movedim(dim, 0).flatten(1)
        constant = arrived[:, 0]
        # Pointwise functions round differently at the end of a vector.
        rounding = torch.finfo(value.dtype).eps ** 0.5 * (1 + constant.abs())
        varies = ((arrived - constant[:, None]).abs() > rounding[:, None]).any(1)
        self.seen[name, dim] = _Seen(index, ids[gone], constant, varies)

    def _along(self, name: str, dim: int) -> Ids | None:
        for ids in self._followed.flows.get(name, ()):
            if ids.shape[dim] > 1:
                return ids.reshape(-1)
        return None

    def _normalised(self, node: fx.Node) -> Any:
        """A norm over the channels that are left, and None if it is no norm or nothing goes."""
        if node.op != "call_function":
            return None
        squares = is_mean_of_squares(node)
        if not squares and operation(node) not in ("aten::layer_norm", "aten::rms_norm"):
            return None
        source = cast(fx.Node, node.args[0])
        dim = len(source.meta["val"].shape) - 1
        ids = self._along(source.name, dim)
        if ids is None or not (gone := self._removed[ids]).any():
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        x = args[0]
        kept = torch.from_numpy(np.flatnonzero(~gone)).to(x.device)
        if squares:
            return x.index_select(dim, kept).mean(dim, bool(argument(node, 2, "keepdim", False)))
        affine = [t.index_select(0, kept) if isinstance(t, Tensor) else t for t in args[2:]]
        part = cast(Any, node.target)(x.index_select(dim, kept), [len(kept)], *affine, **kwargs)
        return torch.zeros_like(x).index_copy(dim, kept, part)
