"""The constants that layers read from channels that go, which their biases can absorb."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, fx, nn

from secateur.prune.channels.channels import Channels, Followed, Removed
from secateur.prune.channels.flow import Reader, argument, operation
from secateur.prune.channels.rules import is_mean_of_squares
from secateur.prune.channels.trace import named_states
from secateur.prune.channels.units import Ids


def constants(
    followed: Followed, values: Mapping[str, Tensor], removed: Removed
) -> tuple[dict[str, Float[Tensor, " out"]], dict[int, str]]:
    """What each bias gains so that its layer's output survives the removal, and who has to stay.

    The model is run on the batch that it was exported with, using `values` as its parameters and
    buffers, and every layer's input is inspected along the removed channels; LayerNorm and RMSNorm
    normalise the channels that are left. A unit has to stay, with a reason, if what a layer reads
    from it is not a constant or the layer cannot absorb it. If there are such units, the run has to
    be repeated without removing them.
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
    """The units that can go, what each bias gains when they do, and why the others stay.

    `values` are the parameters and buffers by name, with the channels in question zero.

    Cost: a run of the model, and one more each time that units have to stay.
    """
    held: dict[int, str] = {}
    removed = removed.copy()
    while True:
        added, more = constants(followed, values, removed)
        if not more:
            return removed, added, held
        held |= more
        removed[list(more)] = False


@torch.no_grad()
def zeroed(
    model: nn.Module, channels: Channels, parts: Iterable[tuple[str, int]], removed: Removed
) -> dict[str, Tensor]:
    """The model's parameters and buffers by name, without the removed channels of these parts.

    A part is a dimension of a parameter, by the name of the parameter and the dimension.
    """
    values = {name: tensor.detach() for name, tensor in named_states(model)}
    for name, dim in parts:
        gone = np.flatnonzero(removed[channels.states[name, dim]])
        values[name] = values[name].index_fill(
            dim, torch.from_numpy(gone).to(values[name].device), 0
        )
    return values


@dataclass(frozen=True)
class _Seen:
    """What a layer reads from removed channels, with their indices and units."""

    index: Int[Tensor, " removed"]
    units: Ids
    constant: Float[Tensor, " removed"]
    varies: Bool[Tensor, " removed"]


def _columns(
    reader: Reader, values: Mapping[str, Tensor], seen: _Seen
) -> tuple[Float[Tensor, "out removed"], Bool[Tensor, " removed"]]:
    """What each channel adds to the layer's output, and whether it adds anything."""
    if reader.zero is not None or reader.weight is None:
        return seen.constant[None], seen.constant != 0
    weight = values[reader.weight].movedim(reader.columns, 1)
    by_channel = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    columns = by_channel.index_select(1, seen.index) * seen.constant
    return columns, (columns != 0).any(0)


def _why_held(
    reader: Reader, added: Mapping[str, Tensor], columns: Tensor, needed: Tensor
) -> str | None:
    """Why the layer cannot absorb the constants, or None."""
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
    """Runs the model with its zeros and records what readers get from the removed channels."""

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
        """The result of a norm over the channels that are left; None for any other operation."""
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
