"""The one place that speaks to `torch.library`: four operators for each format, and parts of some.

`secateur::<format>_linear` is the whole forward of a `SparseLinear`: one call that compile, export
and autograd see as one node. Which implementation runs is decided inside it, at run time, from the
number of tokens, and so in the two that make gradients. `secateur::<format>_unpack` is the dense
weight, an operator because its body reads the number of nonzeros from the data.

    secateur::<format>_linear(Tensor x, Tensor? <stored>..., Tensor[]? arranged, Tensor? bias,
        int out_features, int in_features, str dispatch, str activation) -> Tensor
    secateur::<format>_input_grad(Tensor grad, Tensor? <stored>..., Tensor[]? arranged,
        int out_features, int in_features, str dispatch) -> Tensor
    secateur::<format>_values_grad(Tensor grad, Tensor x, Tensor? <stored>..., Tensor[]? arranged,
        int out_features, int in_features, str dispatch) -> Tensor
    secateur::<format>_unpack(Tensor? <stored>..., Tensor[]? arranged, int out_features,
        int in_features, str dispatch, ScalarType dtype) -> Tensor

The first three are what is left of grad . (x W^T) without one of its three, so that each is a
derivative of the others and there are gradients of gradients.

A layer holds its weight as its implementations read it. What is stored is None where it does not
hold it; `arranged` are the others that it holds, in the order of `arranged_tensors`, and None where
there are none: AOTInductor loses an empty list on the way to an operator.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload

from secateur.formats import reference
from secateur.formats.activations import ACTIVATIONS
from secateur.formats.contract import (
    NO_LIMIT,
    Format,
    Gradients,
    Implementation,
    Packed,
    held_tensors,
)

LIBRARY = torch.library.Library("secateur", "FRAGMENT")
DEFINED: dict[str, Format] = {}  # by the name that torch knows its operators by

Row = tuple[int, Implementation]
Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor])


@lru_cache(maxsize=256)  # a process meets a few tables; parsing one costs more than a small matmul
def table(dispatch: str, implementations: tuple[Implementation, ...]) -> tuple[Row, ...]:
    """Rows (largest number of tokens, implementation) of a dispatch string.

    `"decode<=16 prefill"` runs `decode` for up to 16 tokens and `prefill` above. It is one plain
    string so that an exported program carries it, and because a list costs 5 us more per call.
    """
    named = {implementation.name: implementation for implementation in implementations}
    rows: list[Row] = []
    for word in dispatch.split():
        name, _, limit = word.partition("<=")
        rows.append((int(limit) if limit else NO_LIMIT, named[name]))
    assert rows and rows[-1][0] == NO_LIMIT, dispatch
    return tuple(rows)


def serving(dispatch: str, format: Format, tokens: int) -> Implementation:
    """The implementation that serves so many tokens."""
    rows = table(dispatch, format.implementations)
    return next(entry for most, entry in rows if tokens <= most)


@lru_cache(maxsize=256)
def arranged_tensors(dispatch: str, format: Format) -> tuple[str, ...]:
    """The names of what a layer with this table holds beside, or instead of, what is stored."""
    chosen = dict.fromkeys(entry for _, entry in table(dispatch, format.implementations))
    return tuple(name for name in held_tensors(format, chosen) if name not in format.tensors)


def register(format: Format) -> None:
    """Define the operators of formats of this name, unless they are there.

    They are defined for every device: an implementation, not the operator, knows where it runs. The
    linear's input and bias have gradients, and `values` where a layer trains them; where a format
    rounds inputs, as if it did not (straight through).

    Raises: ValueError if another kind of format has this name.
    """
    known = DEFINED.get(format.name)
    if known is None:
        _define(format.name, format.tensors)
    elif known.tensors != format.tensors or _kind(known) != _kind(format):
        raise ValueError(
            f"a format needs a name of its own, {format.name!r} belongs to {known!r}: rename it"
        )
    DEFINED[format.name] = format


def linear_operator(name: str) -> OpOverload:
    """`secateur::<name>_linear`, of the formats of this name."""
    operator: OpOverload = getattr(torch.ops.secateur, f"{name}_linear").default
    return operator


def unpack_operator(name: str) -> OpOverload:
    """`secateur::<name>_unpack`, of the formats of this name."""
    operator: OpOverload = getattr(torch.ops.secateur, f"{name}_unpack").default
    return operator


def operator(schema: str, run: Callable[..., Result], fake: Callable[..., Result]) -> OpOverload:
    """`secateur::<schema>`, newly defined for every device and without gradients.

    `fake` is an empty result, or two, of the right shape and type, for compilers.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"secateur::{name}", fake, lib=LIBRARY)
    overload: OpOverload = getattr(torch.ops.secateur, name).default
    return overload


def refuse_onnx(name: str) -> None:
    """Raise if this is a trace for ONNX, which would end in an error about an unknown operator."""
    if torch.onnx.is_in_onnx_export():
        raise ValueError(
            f"ONNX needs dense weights, got layers packed as {name}: export a dense copy, "
            "dense = copy.deepcopy(model); secateur.unpack_(dense)"
        )


def _kind(format: Format) -> tuple[str, str]:
    """The class by name: one that was defined again, in a notebook, is the same."""
    return type(format).__module__, type(format).__qualname__


def _define(name: str, stored: tuple[str, ...]) -> None:
    fields = ", ".join(f"Tensor? {tensor}" for tensor in stored)
    count = len(stored)

    def held(
        tensors: Sequence[Tensor | None],
        arranged: Sequence[Tensor] | None,
        shape: tuple[int, int],
        dispatch: str,
        dtype: torch.dtype,
    ) -> Packed:
        known = {key: t for key, t in zip(stored, tensors, strict=True) if t is not None}
        names = arranged_tensors(dispatch, DEFINED[name])  # type: ignore[arg-type]  # hashable: frozen
        known |= dict(zip(names, arranged or (), strict=True))
        return Packed(DEFINED[name].like(shape, known), shape, dtype, known)

    def run_linear(x: Tensor, *rest: Any) -> Tensor:
        arranged, bias, out_features, in_features, dispatch, activation = rest[count:]
        flat = x.reshape(-1, in_features)
        if flat.shape[0] == 0:
            return x.new_empty((*x.shape[:-1], out_features))
        packed = held(rest[:count], arranged, (out_features, in_features), dispatch, x.dtype)
        result = _run(packed, flat, bias, dispatch, activation)
        return result.reshape(*x.shape[:-1], out_features).contiguous()

    def fake_linear(x: Tensor, *rest: Any) -> Tensor:
        refuse_onnx(name)
        return x.new_empty((*x.shape[:-1], rest[count + 2]))

    def run_unpack(*rest: Any) -> Tensor:
        arranged, out_features, in_features, dispatch, dtype = rest[count:]
        shape = out_features, in_features
        return held(rest[:count], arranged, shape, dispatch, dtype).stored().dense()

    def fake_unpack(*rest: Any) -> Tensor:
        arranged, out_features, in_features, _, dtype = rest[count:]
        like: Tensor = next(
            tensor for tensor in (*rest[:count], *(arranged or ())) if tensor is not None
        )
        return like.new_empty((out_features, in_features), dtype=dtype)

    weight = f"{fields}, Tensor[]? arranged"
    sizes = "int out_features, int in_features, str dispatch"
    linear = operator(
        f"{name}_linear(Tensor x, {weight}, Tensor? bias, {sizes}, str activation) -> Tensor",
        run_linear,
        fake_linear,
    )
    operator(
        f"{name}_unpack({weight}, {sizes}, ScalarType dtype) -> Tensor", run_unpack, fake_unpack
    )
    gradients = _define_gradients(name, f"{weight}, {sizes}", held, count)
    three = _Three(linear, *gradients, count, stored.index("values"))
    _differentiate_linear(three)
    _differentiate_gradients(three)


def _define_gradients(
    name: str, weight: str, held: Callable[..., Packed], count: int
) -> tuple[OpOverload, OpOverload]:
    """`<name>_input_grad` and `<name>_values_grad`, for a weight of these arguments."""

    def chosen(grad: Tensor, rest: tuple[Any, ...]) -> tuple[Packed, Gradients]:
        arranged, out_features, in_features, dispatch = rest[count:]
        shape = out_features, in_features
        packed = held(rest[:count], arranged, shape, dispatch, grad.dtype)
        gradients = serving(dispatch, packed.format, grad.numel() // out_features).gradients
        if gradients is None:
            return packed.stored(), reference.GRADIENTS
        return packed, gradients

    def run_input_grad(grad: Tensor, *rest: Any) -> Tensor:
        packed, gradients = chosen(grad, rest)
        result = gradients.of_input(grad.reshape(-1, packed.shape[0]), packed)
        return result.reshape(*grad.shape[:-1], packed.shape[1])

    def fake_input_grad(grad: Tensor, *rest: Any) -> Tensor:
        return grad.new_empty((*grad.shape[:-1], rest[count + 2]))

    def run_values_grad(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
        packed, gradients = chosen(grad, rest)
        flat = grad.reshape(-1, packed.shape[0]), x.reshape(-1, packed.shape[1])
        return gradients.of_values(*flat, packed)

    def fake_values_grad(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
        values = rest[DEFINED[name].tensors.index("values")]
        return torch.empty_like(values, memory_format=torch.contiguous_format)

    return (
        operator(
            f"{name}_input_grad(Tensor grad, {weight}) -> Tensor", run_input_grad, fake_input_grad
        ),
        operator(
            f"{name}_values_grad(Tensor grad, Tensor x, {weight}) -> Tensor",
            run_values_grad,
            fake_values_grad,
        ),
    )


def _run(packed: Packed, x: Tensor, bias: Tensor | None, dispatch: str, activation: str) -> Tensor:
    """The result of the implementation that serves this number of tokens."""
    implementation = serving(dispatch, packed.format, x.shape[0])
    if implementation.arrangement is None:
        packed = packed.stored()
    if activation in implementation.activations:
        return implementation.linear(x, packed, bias, activation=activation)
    result = implementation.linear(x, packed, bias)
    return ACTIVATIONS[activation](result) if activation else result


@dataclass(frozen=True)
class _Three:
    """A format's linear and its gradients, whose weight has `count` stored tensors, `at` values."""

    linear: OpOverload
    input_grad: OpOverload
    values_grad: OpOverload
    count: int
    at: int

    def save(self, ctx: Any, tensors: tuple[Tensor, ...], weight: Sequence[Any]) -> None:
        """Keep these tensors and the weight for the backward pass."""
        *stored, arranged, out_features, in_features, dispatch = weight
        ctx.save_for_backward(*tensors, *stored, *(arranged or ()))
        ctx.sizes = out_features, in_features, dispatch

    def saved(self, ctx: Any, first: int, values: Tensor | None = None) -> tuple[Any, ...]:
        """The weight as operators take it, behind `first` tensors; with other `values` if given."""
        stored = list(ctx.saved_tensors[first : first + self.count])
        stored[self.at] = stored[self.at] if values is None else values
        return *stored, ctx.saved_tensors[first + self.count :] or None, *ctx.sizes

    def run_linear(self, x: Tensor, weight: Sequence[Any]) -> Tensor:
        """The linear without a bias."""
        held, sizes = weight[: self.count + 1], weight[self.count + 1 :]
        result: Tensor = self.linear(x, *held, None, *sizes, "")
        return result

    def of_weight(self, values: Tensor | None, weight: Sequence[Any]) -> tuple[Any, ...]:
        """The gradients of the weight's tensors, all of them None but that of values."""
        none: list[Any] = [None] * self.count
        none[self.at] = values
        return *none, [None] * len(weight[self.count] or ()) or None


def _differentiate_linear(three: _Three) -> None:
    count, at = three.count, three.at

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *weight, activation = inputs
        del weight[count + 1]  # the bias
        if activation:
            raise ValueError(
                f"{three.linear} has no gradients through {activation!r}: call it without "
                "activation, and the activation after it"
            )
        three.save(ctx, (x,) if ctx.needs_input_grad[1 + at] else (), weight)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed, values = ctx.needs_input_grad, None
        weight = three.saved(ctx, int(needed[1 + at]))
        x = three.input_grad(grad, *weight) if needed[0] else None
        if needed[1 + at]:
            values = three.values_grad(grad, ctx.saved_tensors[0], *weight)
        bias = grad.reshape(-1, grad.shape[-1]).sum(0) if needed[2 + count] else None
        return x, *three.of_weight(values, weight), bias, None, None, None, None

    _register_gradient(three.linear, setup, backward)


def _differentiate_gradients(three: _Three) -> None:
    def setup_of_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        three.save(ctx, inputs[:1], inputs[1:])

    def of_input(ctx: Any, other: Tensor) -> tuple[Any, ...]:
        weight, needed, values = three.saved(ctx, 1), ctx.needs_input_grad, None
        grad = three.run_linear(other, weight) if needed[0] else None
        if needed[1 + three.at]:
            values = three.values_grad(ctx.saved_tensors[0], other, *weight)
        return grad, *three.of_weight(values, weight), None, None, None

    def setup_of_values(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        three.save(ctx, inputs[:2], inputs[2:])

    def of_values(ctx: Any, other: Tensor) -> tuple[Any, ...]:
        (grad, x, *_), needed = ctx.saved_tensors, ctx.needs_input_grad
        weight = three.saved(ctx, 2, other)
        of_grad = three.run_linear(x, weight) if needed[0] else None
        of_x = three.input_grad(grad, *weight) if needed[1] else None
        return of_grad, of_x, *three.of_weight(None, weight), None, None, None

    _register_gradient(three.input_grad, setup_of_input, of_input)
    _register_gradient(three.values_grad, setup_of_values, of_values)


def _register_gradient(
    op: OpOverload, setup: Callable[..., None], backward: Callable[..., tuple[Any, ...]]
) -> None:
    torch.library.register_autograd(op.name(), backward, setup_context=setup, lib=LIBRARY)
