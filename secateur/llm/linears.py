"""Linear layers of a decode step, bound to tensors: siblings in one launch where they agree."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.formats import SparseLinear
from secateur.formats.kernels import decode24, prefill16
from secateur.formats.kernels.decode24 import PLAIN, Fusion, Kind
from secateur.formats.kernels.decode_step import Bound

UNITS, SCALES = "units", "scales"


@dataclass(frozen=True)
class Joined:
    """Packed layers with one input as one: their units, scales and biases one after another."""

    units: Tensor
    scales: Tensor | None
    bias: Tensor | None
    kind: Kind
    grouped: bool
    shape: tuple[int, int]
    dtype: torch.dtype

    def why_not_fused(self, tokens: int, fusion: Fusion) -> str | None:
        """Why a launch cannot do more than multiply, or None."""
        told = self.kind, self.grouped, self.dtype, self.shape, tokens, fusion
        return decode24.why_not_fused(*told, self.units.device)

    def into(
        self, x: Tensor, y: Tensor, fusion: Fusion = PLAIN, norm: tuple[Tensor, float] | None = None
    ) -> Bound:
        """Y = the results for x, side by side: see `decode24.multiply_into`."""
        weight = self.units, self.scales, self.bias, self.kind, self.grouped
        return decode24.multiply_into(x, *weight, y, fusion, norm)

    def of_many(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """The results for many tokens, side by side: see `prefill16.multiply`."""
        weight = self.units, self.scales, self.bias, self.kind, self.grouped
        return prefill16.multiply(x, *weight, self.shape[0])


@dataclass(frozen=True)
class Siblings:
    """Layers with one input as a prompt's tokens go through them: in one launch, where they can."""

    layers: Sequence[nn.Module]
    whole: Joined | None

    @staticmethod
    def of(layers: Sequence[nn.Module]) -> "Siblings":
        whole = joined(layers, 1)
        if not isinstance(whole, Joined):
            return Siblings(layers, None)
        problem = prefill16.why_not(whole.shape, whole.dtype, whole.units.device)
        return Siblings(layers, whole if problem is None else None)

    def __call__(
        self, x: Float[Tensor, "rows in"], widths: Sequence[int]
    ) -> tuple[Float[Tensor, "rows out"], ...]:
        """Their results side by side, in parts of these widths."""
        if self.whole is not None and all(_runs_prefill(one, len(x)) for one in self.layers):
            return self._parts(self.whole.of_many(x), widths)
        results = tuple(layer(x) for layer in self.layers)
        return results if len(results) > 1 else self._parts(results[0], widths)

    @staticmethod
    def _parts(y: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(torch.split(y, list(widths), 1))


def _runs_prefill(layer: nn.Module, tokens: int) -> bool:
    return isinstance(layer, SparseLinear) and layer.runs(tokens) == "prefill"


def joined(layers: Sequence[nn.Module], tokens: int) -> Joined | str:
    """The layers as one, or why they cannot run as one launch at so many tokens.

    Their units come to lie one after another in one tensor, of which each layer holds its part.
    """
    packed = [one for one in layers if isinstance(one, SparseLinear) and UNITS in one.held_bytes]
    if len(packed) < len(layers):
        return "not all of them are packed layers that the decode kernel runs"
    kinds = dict.fromkeys((str(one.format), one.dtype, one.in_features) for one in packed)
    if len(kinds) > 1:
        return f"they are packed differently: {', '.join(format for format, _, _ in kinds)}"
    if any(one.activation for one in packed):
        return "one has an activation of its own"
    held = [one.held for one in packed]
    for one in held:
        if (problem := decode24.why_not(one.shape, one.dtype, one.device, tokens)) is not None:
            return problem
    kind, grouped = decode24.FORMATS[str(packed[0].format)]
    own_scales = kind.numbers is not Kind.W16 and not grouped
    return Joined(
        _in_one_place(packed),
        torch.cat([one[SCALES] for one in held]) if own_scales else None,
        _bias(packed),
        *(kind, grouped),
        (sum(one.out_features for one in packed), packed[0].in_features),
        packed[0].dtype,
    )


def linear_operations(layers: Sequence[nn.Module], x: Tensor, y: Tensor) -> list[Bound]:
    """Y = the results of these layers for x, side by side, in as few launches as there can be."""
    if isinstance(whole := joined(layers, len(x)), Joined):
        return [whole.into(x, y)]
    widths = [int(layer.out_features) for layer in layers]  # type: ignore[arg-type]
    places = y.split(widths, dim=1)
    if len(layers) > 1 and len(y) == 1:
        parts = zip(layers, places, strict=True)
        return [one for layer, place in parts for one in linear_operations([layer], x, place)]
    return [_called(layer, x, place) for layer, place in zip(layers, places, strict=True)]


def _in_one_place(layers: Sequence[SparseLinear]) -> Tensor:
    """The layers' units as one tensor, which holds them from now on."""
    units = [layer.held[UNITS] for layer in layers]
    if all(b.data_ptr() == a.data_ptr() + a.nbytes for a, b in pairwise(units)) and all(
        one.untyped_storage().data_ptr() == units[0].untyped_storage().data_ptr() for one in units
    ):
        return units[0].as_strided((sum(map(len, units)), *units[0].shape[1:]), units[0].stride())
    whole = torch.cat(units)
    for layer, part in zip(layers, whole.split([len(one) for one in units]), strict=True):
        layer.lie_in(UNITS, part)
    return whole


def _bias(layers: Sequence[SparseLinear]) -> Tensor | None:
    """The biases, zeros for a layer without one; None if none has one."""
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [
            torch.zeros(layer.out_features, dtype=layer.dtype, device=layer.device)
            if layer.bias is None
            else layer.bias.detach()
            for layer in layers
        ]
    )


def _called(layer: nn.Module, x: Tensor, place: Tensor) -> Bound:
    """The layer as it is, on the stream that is current."""
    if type(layer) is nn.Linear and layer.bias is None and place.is_contiguous():
        weight = layer.weight.detach().t()

        def multiply(stream: int) -> None:
            torch.mm(x, weight, out=place)

        return multiply

    def call(stream: int) -> None:
        place.copy_(layer(x))

    return call
