"""Training with a 2:4 weight: forward and the input's gradient on sparse tensor cores.

The parameter stays dense. Each forward packs it anew, both ways in one pass (`kernels/both_ways`):
the weight as the forward reads it, and its transpose for the gradient of the input. The gradient of
the weight is the dense one, so that what was dropped may come back: a straight-through estimator.

    secateur::training_linear(Tensor x, Tensor weight, Tensor? bias, int selection, bool is_packed)
        -> (Tensor, Tensor)
    secateur::training_input_grad(Tensor grad, Tensor back, int in_features, bool is_packed)
        -> Tensor
"""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from secateur.core.autocast import autocast_dtype, without_autocast
from secateur.formats import two_of_four
from secateur.formats.kernels import both_ways, decode24, prefill16
from secateur.formats.kernels.both_ways import Selection
from secateur.formats.op import LIBRARY, operator


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
        result, _ = LINEAR(flat, weight, bias, int(selection), is_packed)
    shaped: Tensor = result.reshape(*x.shape[:-1], len(weight))
    return shaped


class TrainingLinear(nn.Linear):
    """A linear layer with a 2:4 weight that trains by kernels from so many tokens on.

    A layer becomes one in its place (`become`), and is plain again by `restore`, so that hooks,
    parameters and whoever holds the module go on as ever. Fewer tokens, and calls that need no
    gradient, run dense. Above, the weight is packed as it is; the input's gradient is that of the
    weight pruned once more along columns (`Selection.ROWS`), and the weight's gradient is whole.
    Whatever the weight has beyond 2:4 is left out of the packs.
    """

    least_tokens: int

    @staticmethod
    def become(linear: nn.Linear, least_tokens: int) -> None:
        """Have a plain linear layer run packed from so many tokens on."""
        assert type(linear) in (nn.Linear, TrainingLinear), type(linear)
        linear.least_tokens = least_tokens  # type: ignore[assignment]
        linear.__class__ = TrainingLinear

    def restore(self) -> None:
        """Be a plain linear layer again."""
        del self.least_tokens
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def forward(self, input: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        if input.numel() < self.least_tokens * self.in_features or not torch.is_grad_enabled():
            return super().forward(input)
        return linear(input, self.weight, self.bias, Selection.ROWS)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, least_tokens={self.least_tokens}"


def _linear(
    x: Float[Tensor, "tokens in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    selection: int,
    is_packed: bool,
) -> tuple[Float[Tensor, "tokens out"], Tensor]:
    """The result, and the weight as the backward reads it: units of its transpose, or dense."""
    if bias is not None:
        bias = bias.to(x.dtype)
    if is_packed:
        pack = both_ways.pack if weight.is_cuda else both_ways.reference.pack
        units, back = pack(weight, x.dtype, Selection(selection))
        return _multiply(x, units, bias, len(weight)), back
    forward, backward = both_ways.reference.kept(weight, Selection(selection))
    values = weight.to(x.dtype)
    result = F.linear(x, values.masked_fill(~forward, 0), bias)
    return result, values.masked_fill(~backward, 0)


def _fake_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, selection: int, is_packed: bool
) -> tuple[Tensor, Tensor]:
    back = both_ways.empty(weight)[1] if is_packed else torch.empty_like(weight, dtype=x.dtype)
    return x.new_empty(x.shape[0], weight.shape[0]), back


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _, ctx.is_packed = inputs
    ctx.stored, ctx.columns = weight.dtype, weight.shape[1]
    ctx.save_for_backward(x, output[1])
    ctx.mark_non_differentiable(output[1])


@once_differentiable  # what it prunes by has no gradient
def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, back = ctx.saved_tensors
    of_x = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = INPUT_GRAD(grad, back, ctx.columns, ctx.is_packed)
    if ctx.needs_input_grad[1]:
        of_weight = (grad.t() @ x).to(ctx.stored)
    if ctx.needs_input_grad[2]:
        of_bias = grad.sum(0).to(ctx.stored)
    return of_x, of_weight, of_bias, None, None


def _input_grad(
    grad: Float[Tensor, "tokens out"], back: Tensor, in_features: int, is_packed: bool
) -> Float[Tensor, "tokens in"]:
    return _multiply(grad, back, None, in_features) if is_packed else grad @ back


def _fake_input_grad(grad: Tensor, back: Tensor, in_features: int, is_packed: bool) -> Tensor:
    return grad.new_empty(grad.shape[0], in_features)


def _multiply(
    x: Float[Tensor, "tokens in"],
    units: UInt8[Tensor, "tiles units bytes"],
    bias: Float[Tensor, " out"] | None,
    out_features: int,
) -> Float[Tensor, "tokens out"]:
    kind = decode24.Kind.W16
    if x.is_cuda:
        return prefill16.multiply(x, units, None, bias, kind, False, out_features, just_packed=True)
    kept, metadata, _ = decode24.restore(kind, units, False, x.shape[1], x.dtype)
    assert metadata is not None  # of 2:4 it never is
    return F.linear(x, two_of_four.scatter(kept, metadata), bias)


LINEAR = operator(
    "training_linear(Tensor x, Tensor weight, Tensor? bias, int selection, bool is_packed)"
    " -> (Tensor, Tensor)",
    _linear,
    _fake_linear,
)
INPUT_GRAD = operator(
    "training_input_grad(Tensor grad, Tensor back, int in_features, bool is_packed) -> Tensor",
    _input_grad,
    _fake_input_grad,
)
torch.library.register_autograd(LINEAR.name(), _backward, setup_context=_setup, lib=LIBRARY)
