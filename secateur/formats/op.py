"""The one place that speaks to `torch.library`: two operators for each format, and parts of some.

`secateur::<format>_linear` is the whole forward of a `SparseLinear`: one call that compile, export
and autograd see as one node. Which implementation runs is decided inside it, at run time, from the
number of tokens. `secateur::<format>_unpack` is the dense weight; the backward needs it as an
operator of its own, because its body reads the number of nonzeros from the data.

    secateur::<format>_linear(Tensor x, Tensor <stored>..., Tensor? bias, int out_features,
        int in_features, Tensor[] arrangement, str dispatch, str activation) -> Tensor
    secateur::<format>_unpack(Tensor <stored>..., int out_features, int in_features) -> Tensor
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from secateur.formats.activations import ACTIVATIONS
from secateur.formats.contract import Format, Implementation, Packed, typed_tensor

LIBRARY = torch.library.Library("secateur", "FRAGMENT")
DEFINED: dict[str, Format] = {}  # by the name that torch knows its operators by
NO_LIMIT = 2**63 - 1  # the last row of a dispatch table serves every larger number of tokens

Row = tuple[int, Implementation, slice]


@lru_cache(maxsize=256)  # a process meets a few tables; parsing one costs more than a small matmul
def table(dispatch: str, implementations: tuple[Implementation, ...]) -> tuple[Row, ...]:
    """Rows (largest tokens, implementation, its part of the arrangement) of a dispatch string.

    An implementation that has several rows is arranged once.

    `"decode<=16 prefill"` runs `decode` for up to 16 tokens and `prefill` above. It is one plain
    string so that an exported program carries it, and because a list costs 5 us more per call.
    """
    named = {implementation.name: implementation for implementation in implementations}
    rows: list[Row] = []
    parts: dict[str, slice] = {}
    start = 0
    for word in dispatch.split():
        name, _, limit = word.partition("<=")
        if name not in parts:
            parts[name] = slice(start, start + len(named[name].arrangement))
            start = parts[name].stop
        rows.append((int(limit) if limit else NO_LIMIT, named[name], parts[name]))
    assert rows and rows[-1][0] == NO_LIMIT, dispatch
    return tuple(rows)


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


def _kind(format: Format) -> tuple[str, str]:
    """The class by name: one that was defined again, in a notebook, is the same."""
    return type(format).__module__, type(format).__qualname__


def _packed(name: str, shape: tuple[int, int], stored: Sequence[Tensor]) -> Packed:
    format = DEFINED[name]
    tensors = dict(zip(format.tensors, stored, strict=True))
    return Packed(format.like(shape, tensors), shape, tensors)


def _define(name: str, tensors: tuple[str, ...]) -> None:
    fields = ", ".join(f"Tensor {tensor}" for tensor in tensors)
    count, typed = len(tensors), tensors.index(typed_tensor(tensors))

    def run_linear(x: Tensor, *rest: Any) -> Tensor:
        stored, (bias, out_features, in_features, arrangement, dispatch, activation) = (
            rest[:count],
            rest[count:],
        )
        flat = x.reshape(-1, in_features)
        if flat.shape[0] == 0:
            return x.new_empty((*x.shape[:-1], out_features))
        packed = _packed(name, (out_features, in_features), stored)
        result = _run(packed, flat, bias, arrangement, dispatch, activation)
        return result.reshape(*x.shape[:-1], out_features).contiguous()

    def fake_linear(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], rest[count + 1]))

    def run_unpack(*rest: Any) -> Tensor:
        return _packed(name, rest[count:], rest[:count]).dense()

    def fake_unpack(*rest: Any) -> Tensor:
        like: Tensor = rest[typed]
        return like.new_empty(rest[count:])

    linear = operator(
        f"{name}_linear(Tensor x, {fields}, Tensor? bias, int out_features, int in_features, "
        "Tensor[] arrangement, str dispatch, str activation) -> Tensor",
        run_linear,
        fake_linear,
    )
    unpack = operator(
        f"{name}_unpack({fields}, int out_features, int in_features) -> Tensor",
        run_unpack,
        fake_unpack,
    )
    _differentiate(linear, unpack, count)


def _run(
    packed: Packed,
    x: Tensor,
    bias: Tensor | None,
    arrangement: Sequence[Tensor],
    dispatch: str,
    activation: str,
) -> Tensor:
    """The result of the implementation that serves this number of tokens."""
    rows = table(dispatch, packed.format.implementations)
    _, implementation, part = next(row for row in rows if x.shape[0] <= row[0])
    arranged = arrangement[part]
    if activation in implementation.activations:
        return implementation.linear(x, packed, bias, *arranged, activation=activation)
    result = implementation.linear(x, packed, bias, *arranged)
    return ACTIVATIONS[activation](result) if activation else result


def _differentiate(linear_op: OpOverload, unpack_op: OpOverload, count: int) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *rest = inputs
        if rest[-1]:
            raise ValueError(
                f"{linear_op} has no gradients through {rest[-1]!r}: call it without activation, "
                "and the activation after it"
            )
        ctx.save_for_backward(*rest[:count])
        ctx.shape = rest[count + 1 : count + 3]
        ctx.arrangement_count = len(rest[count + 3])

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ unpack_op(*ctx.saved_tensors, *ctx.shape)
        if ctx.needs_input_grad[1 + count]:
            bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0)
        arrangement_grads = [None] * ctx.arrangement_count
        return x_grad, *[None] * count, bias_grad, None, None, arrangement_grads, None, None

    torch.library.register_autograd(
        linear_op.name(), backward, setup_context=setup_context, lib=LIBRARY
    )
