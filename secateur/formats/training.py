"""Training with a 2:4 weight: forward and the input's gradient on sparse tensor cores.

The parameter stays dense. Each forward packs it anew, both ways in one pass (`kernels/both_ways`):
the weight as the forward reads it, and its transpose for the gradient of the input. The gradient of
the weight is the dense one, so that what was dropped may come back: a straight-through estimator.

    secateur::pack_both_ways(Tensor weight, ScalarType dtype, int selection) -> (Tensor, Tensor)
    secateur::multiply_units(Tensor x, Tensor units, Tensor? bias, int out_features) -> Tensor
"""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from secateur.core.autocast import autocast_dtype, without_autocast
from secateur.formats import two_of_four
from secateur.formats.kernels import both_ways, decode24, prefill16
from secateur.formats.kernels.both_ways import Selection
from secateur.formats.op import operator


def why_not(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a layer of this shape cannot train on kernels here in this dtype, or None."""
    problem = both_ways.why_not(shape, dtype, device)
    return problem or prefill16.why_not(shape, dtype, device)


def linear(
    x: Float[Tensor, "*tokens in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    selection: Selection = Selection.TILES,
    is_packed: bool | None = None,
) -> Float[Tensor, "*tokens out"]:
    """`x @ S(weight).T + bias`, S(weight) the weight with the zeros that `selection` chooses.

    The input's gradient is that of S(weight); with `ROWS`, of S(weight) pruned once more along
    columns. The weight's gradient is `grad.T @ x`, whole. Under autocast it runs in its dtype, as
    `nn.Linear` does. Without `is_packed` kernels run it where they can, else dense matrices do,
    with the same zeros.

    Cost: packed, both products take about two thirds of dense ones; a pass over the weight, which
        reads it and writes 2.25 bytes a number, half of which are kept for the backward.
    """
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        x = x.to(dtype)
    if is_packed is None:
        is_packed = why_not((weight.shape[0], weight.shape[1]), x.dtype, weight.device) is None
    with without_autocast(x.device):
        flat = x.reshape(-1, weight.shape[1])
        result: Tensor = _Linear.apply(flat, weight, bias, int(selection), is_packed)  # type: ignore[no-untyped-call]
    return result.reshape(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, selection: int, is_packed: bool
    ) -> Tensor:
        if bias is not None:
            bias = bias.to(x.dtype)
        if is_packed:
            units, back = PACK(weight, x.dtype, selection)
            result: Tensor = MULTIPLY(x, units, bias, weight.shape[0])
        else:
            of_rows, of_columns = both_ways.reference.kept(weight, Selection(selection))
            kept = weight.to(x.dtype).masked_fill(~of_rows, 0)
            back = kept.masked_fill(~of_columns, 0)
            result = F.linear(x, kept, bias)
        ctx.save_for_backward(x, back)
        ctx.is_packed, ctx.stored, ctx.columns = is_packed, weight.dtype, weight.shape[1]
        ctx.of_bias = None if bias is None else bias.dtype
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, back = ctx.saved_tensors
        needed = ctx.needs_input_grad
        of_x = of_weight = of_bias = None
        if needed[0]:
            of_x = MULTIPLY(grad, back, None, ctx.columns) if ctx.is_packed else grad @ back
        if needed[1]:
            of_weight = (grad.t() @ x).to(ctx.stored)
        if needed[2]:
            of_bias = grad.sum(0)
        return of_x, of_weight, of_bias, None, None


def _pack(
    weight: Float[Tensor, "out in"], dtype: torch.dtype, selection: int
) -> tuple[UInt8[Tensor, "tiles units bytes"], UInt8[Tensor, "other_tiles other_units bytes"]]:
    pack = both_ways.pack if weight.is_cuda else both_ways.reference.pack
    return pack(weight, dtype, Selection(selection))


def _fake_pack(weight: Tensor, dtype: torch.dtype, selection: int) -> tuple[Tensor, Tensor]:
    return both_ways.empty(weight)


def _multiply(
    x: Float[Tensor, "tokens in"],
    units: UInt8[Tensor, "tiles units bytes"],
    bias: Float[Tensor, " out"] | None,
    out_features: int,
) -> Float[Tensor, "tokens out"]:
    if x.is_cuda:
        kind = decode24.Kind.W16
        return prefill16.multiply(x, units, None, bias, kind, False, out_features, just_packed=True)
    kept, metadata, _ = decode24.restore(decode24.Kind.W16, units, False, x.shape[1], x.dtype)
    return F.linear(x, two_of_four.scatter(kept, metadata), bias)


def _fake_multiply(x: Tensor, units: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


PACK = operator(
    "pack_both_ways(Tensor weight, ScalarType dtype, int selection) -> (Tensor, Tensor)",
    _pack,
    _fake_pack,
)
MULTIPLY = operator(
    "multiply_units(Tensor x, Tensor units, Tensor? bias, int out_features) -> Tensor",
    _multiply,
    _fake_multiply,
)
