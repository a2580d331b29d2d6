"""What layers read of channels that are to be removed: a constant, which their biases can take."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, fx

from secateur.compat.torchao.structured_channels import Followed, Removed
from secateur.compat.torchao.structured_flow import Reader, argument, operation
from secateur.compat.torchao.structured_rules import is_mean_of_squares
from secateur.compat.torchao.structured_units import Ids


def constants(
    followed: Followed, values: Mapping[str, Tensor], removed: Removed
) -> dict[str, Float[Tensor, " out"]]:
    """Bias -> what is added to it so that the layer's output is the same without the channels.

    The masked model, whose parameters and buffers are `values`, is run on the batch that it was
    exported with, and what arrives of the removed channels is looked at. Statistics of LayerNorm
    and RMSNorm are those of the channels that are left.

    Raises:
        ValueError: if it is no constant, or a layer cannot take it.
    """
    run = _Masked(followed, removed)
    with torch.no_grad():
        run.run(*followed.trace.arguments(values))
    added: dict[str, Tensor] = {}
    for reader in followed.readers:
        found = run.seen.get((reader.source, reader.dim))
        if found is None:
            continue
        index, constant = found
        if isinstance(constant, str):
            raise ValueError(f"{_named(reader)} {constant}")
        addition = _addition(reader, values, index, constant)
        if addition is None:
            continue
        bias = cast(str, reader.bias)
        if bias in added and not torch.allclose(added[bias], addition):
            raise ValueError(
                f"{_named(reader)} reads several constants of removed channels, as it is called "
                "several times: use prune_bias=True"
            )
        added[bias] = addition
    return added


def _addition(
    reader: Reader, values: Mapping[str, Tensor], index: Tensor, constant: Tensor
) -> Tensor | None:
    if not constant.any():
        return None
    if reader.zero is None and reader.weight is not None:
        weight = values[reader.weight].movedim(reader.columns, 1)
        by_channel = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
        addition = by_channel.index_select(1, index) @ constant
        if reader.bias is not None or not addition.any():
            return addition if reader.bias is not None else None
    reason = reader.zero or "it has no bias to take it"
    raise ValueError(
        f"{_named(reader)} reads the constant {float(constant[constant != 0][0]):.3g} of channels "
        f"that are removed, and {reason}: use prune_bias=True, which makes it 0, or leave out the "
        "layers before it"
    )


def _named(reader: Reader) -> str:
    return reader.layer or "the model itself"


class _Masked(fx.Interpreter):
    """Runs the masked model and keeps what readers read of channels that are removed."""

    def __init__(self, followed: Followed, removed: Removed) -> None:
        super().__init__(followed.trace.graph)
        self._followed, self._removed = followed, removed
        self._wanted = {(reader.source, reader.dim) for reader in followed.readers}
        self.seen: dict[tuple[str, int], tuple[Tensor, Tensor | str]] = {}

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
        if ((arrived - constant[:, None]).abs() <= rounding[:, None]).all():
            self.seen[name, dim] = index, constant
        else:
            self.seen[name, dim] = (
                index,
                "reads channels that are removed, and what it reads depends on the input: use "
                "prune_bias=True, or leave out the layers before it",
            )

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
