"""Linear layers of a decode step, bound to tensors: siblings in one launch where they agree."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from secateur.formats import SparseLinear
from secateur.formats.kernels import decode24
from secateur.formats.kernels.decode24 import Kind
from secateur.formats.kernels.decode_step import Bound

UNITS, SCALES = "units", "scales"


def linear_operations(layers: Sequence[nn.Module], x: Tensor, y: Tensor) -> list[Bound]:
    """Y = the results of these layers for x, side by side.

    Layers of one format that hold units run as one launch; their units come to lie one after
    another in one tensor, of which each layer holds its part. Others run one by one.
    """
    if (joined := _joined(layers, x, y)) is not None:
        return [joined]
    widths = [_out_features(layer) for layer in layers]
    places = y.split(widths, dim=1)
    if len(layers) > 1 and (y.shape[0] == 1 or all(p.is_contiguous() for p in places)):
        return [
            operation
            for layer, place in zip(layers, places, strict=True)
            for operation in linear_operations([layer], x, place)
        ]
    return [_called(layer, x, place) for layer, place in zip(layers, places, strict=True)]


def why_separate(layers: Sequence[nn.Module]) -> str | None:
    """Why these layers cannot run as one launch, or None."""
    packed = _packed(layers)
    if len(packed) < len(layers):
        return "not all of them are 2:4 layers that the decode kernel runs"
    kinds = dict.fromkeys((str(one.format), one.dtype, one.in_features) for one in packed)
    if len(kinds) > 1:
        return f"they are packed differently: {', '.join(format for format, _, _ in kinds)}"
    if any(one.activation for one in packed):
        return "one has an activation of its own"
    return None


def _packed(layers: Sequence[nn.Module]) -> list[SparseLinear]:
    """Those of the layers that hold units."""
    return [one for one in layers if isinstance(one, SparseLinear) and UNITS in one.held_bytes]


def _joined(layers: Sequence[nn.Module], x: Tensor, y: Tensor) -> Bound | None:
    """One launch for all of them, or None where they do not agree or the kernel cannot run."""
    if why_separate(layers) is not None:
        return None
    packed = _packed(layers)
    kind, grouped = decode24.FORMATS[str(packed[0].format)]
    if any(decode24.why_not(one.shape, one.dtype, one.device, len(x)) for one in packed):
        return None
    scales = None
    if kind is not Kind.W16 and not grouped:
        scales = torch.cat([one.held[SCALES] for one in packed])
    return decode24.multiply_into(
        x, _in_one_place(packed), scales, _bias(layers, y), kind, grouped, y
    )


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


def _bias(layers: Sequence[nn.Module], y: Tensor) -> Tensor | None:
    """The biases, zeros for a layer without one; None if none has one."""
    biases = [getattr(layer, "bias", None) for layer in layers]
    if all(bias is None for bias in biases):
        return None
    parts = [
        y.new_zeros(_out_features(layer)) if bias is None else bias.detach()
        for layer, bias in zip(layers, biases, strict=True)
    ]
    return torch.cat(parts)


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


def _out_features(layer: nn.Module) -> int:
    return int(layer.out_features)  # type: ignore[arg-type]
