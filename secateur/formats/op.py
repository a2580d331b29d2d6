"""The one place that speaks to `torch.library`: two operators for each format, and parts of some.

`secateur::<format>_linear` is the whole forward of a `SparseLinear`: one call that compile, export
and autograd see as one node. Which implementation runs is decided inside it, at run time, from the
number of tokens. `secateur::<format>_unpack` is the dense weight; the backward needs it as an
operator of its own, because its body reads the number of nonzeros from the data.

    secateur::<format>_linear(Tensor x, Tensor? <stored>..., Tensor[]? arranged, Tensor? bias,
        int out_features, int in_features, str dispatch, str activation) -> Tensor
    secateur::<format>_unpack(Tensor? <stored>..., Tensor[]? arranged, int out_features,
        int in_features, str dispatch, ScalarType dtype) -> Tensor

A layer holds its weight as its implementations read it. What is stored is None where it does not
hold it; `arranged` are the others that it holds, in the order of `arranged_tensors`, and None where
there are none: AOTInductor loses an empty list on the way to an operator.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from secateur.formats.activations import ACTIVATIONS
from secateur.formats.contract import Format, Implementation, Packed, held_tensors

LIBRARY = torch.library.Library("secateur", "FRAGMENT")
DEFINED: dict[str, Format] = {}  # by the name that torch knows its operators by
NO_LIMIT = 2**63 - 1  # the last row of a dispatch table serves every larger number of tokens

Row = tuple[int, Implementation]


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
    """Define `<name>_linear` and `<name>_unpack`, unless formats of this name have them.

    The operators are defined for every device: an implementation, not the operator, knows where it
    runs. The linear's input and bias have gradients, the packed weight is frozen: `grad @ weight`,
    dense; where a format rounds inputs, as if it did not (straight through).

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


def operator(schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> OpOverload:
    """`secateur::<schema>`, newly defined for every device and without gradients.

    `fake` is an empty result of the right shape and type, for compilers.
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

    linear = operator(
        f"{name}_linear(Tensor x, {fields}, Tensor[]? arranged, Tensor? bias, int out_features, "
        "int in_features, str dispatch, str activation) -> Tensor",
        run_linear,
        fake_linear,
    )
    unpack = operator(
        f"{name}_unpack({fields}, Tensor[]? arranged, int out_features, int in_features, "
        "str dispatch, ScalarType dtype) -> Tensor",
        run_unpack,
        fake_unpack,
    )
    _differentiate(linear, unpack, count)


def _run(packed: Packed, x: Tensor, bias: Tensor | None, dispatch: str, activation: str) -> Tensor:
    """The result of the implementation that serves this number of tokens."""
    implementation = serving(dispatch, packed.format, x.shape[0])
    if implementation.arrangement is None:
        packed = packed.stored()
    if activation in implementation.activations:
        return implementation.linear(x, packed, bias, activation=activation)
    result = implementation.linear(x, packed, bias)
    return ACTIVATIONS[activation](result) if activation else result


def _differentiate(linear_op: OpOverload, unpack_op: OpOverload, count: int) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *rest = inputs
        if rest[-1]:
            raise ValueError(
                f"{linear_op} has no gradients through {rest[-1]!r}: call it without activation, "
                "and the activation after it"
            )
        arranged, _, out_features, in_features, dispatch, _ = rest[count:]
        ctx.save_for_backward(*rest[:count], *(arranged or ()))
        ctx.rest = out_features, in_features, dispatch, x.dtype

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x_grad = bias_grad = None
        stored, arranged = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if ctx.needs_input_grad[0]:
            x_grad = grad @ unpack_op(*stored, arranged or None, *ctx.rest)
        if ctx.needs_input_grad[2 + count]:
            bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0)
        no_grads = [None] * len(arranged) or None
        return x_grad, *[None] * count, no_grads, bias_grad, None, None, None, None

    torch.library.register_autograd(
        linear_op.name(), backward, setup_context=setup_context, lib=LIBRARY
    )
