"""The registered operators: opcheck, dispatch by tokens, and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.formats import parse_format
from secateur.formats.contract import Implementation
from secateur.formats.op import NO_LIMIT, linear_operator, table, unpack_operator
from tests.formats.weights import (
    DYNAMIC,
    EXACT,
    FORMATS,
    QUANTISED,
    fitting_weight,
    packed_weight,
    tokens_in,
)


def operands(
    format: str, dtype: torch.dtype = torch.float32, arranged: bool = True
) -> tuple[Tensor, list[Tensor], list[Tensor], str]:
    """The dense weight, its packed tensors, an arrangement and the implementation it is for."""
    weight = fitting_weight(format, 8, 16, dtype)
    packed = packed_weight(format, weight)
    here = [runs for runs in packed.format.implementations if runs.why_not(packed, 1) is None]
    runs = here[0 if arranged else -1]
    return weight, list(packed.tensors.values()), list(runs.arrange(packed)), runs.name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_of_the_linear(format: str, bias: bool) -> None:
    _, tensors, arrangement, name = operands(format)
    x = tokens_in(3, 16).requires_grad_()
    offset = tokens_in(8, seed=3).requires_grad_() if bias else None
    linear = linear_operator(parse_format(format).name)
    torch.library.opcheck(linear, (x, *tensors, offset, 8, 16, arrangement, name, ""))
    x = tokens_in(3, 1, 16).requires_grad_()
    torch.library.opcheck(linear, (x, *tensors, offset, 8, 16, [], "reference", ""))


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_of_unpack(format: str) -> None:
    weight, tensors, _, _ = operands(format)
    unpack = unpack_operator(parse_format(format).name)
    torch.library.opcheck(unpack, (*tensors, 8, 16))
    assert torch.equal(unpack(*tensors, 8, 16), weight)


@pytest.mark.parametrize("arranged", [True, False])
@pytest.mark.parametrize("format", EXACT + QUANTISED)
def test_gradients_of_input_and_bias(format: str, arranged: bool) -> None:
    weight, tensors, arrangement, name = operands(format, torch.float64, arranged)
    linear = linear_operator(parse_format(format).name)
    x = tokens_in(3, 16, dtype=torch.float64).requires_grad_()
    bias = tokens_in(8, dtype=torch.float64, seed=3).requires_grad_()

    def run(x: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = linear(x, *tensors, bias, 8, 16, arrangement, name, "")
        return result

    assert torch.autograd.gradcheck(run, (x, bias))
    assert torch.autograd.gradgradcheck(run, (x, bias))
    up = tokens_in(3, 8, dtype=torch.float64, seed=4)
    grads = torch.autograd.grad(run(x, bias), (x, bias), up)
    assert torch.allclose(grads[0], up @ weight)
    assert torch.allclose(grads[1], up.sum(0))


@pytest.mark.parametrize("format", DYNAMIC)
def test_a_dynamic_format_hands_gradients_straight_through(format: str) -> None:
    """Rounding is a staircase, whose slope is 0 or infinite; the gradient is that without it."""
    weight, tensors, _, _ = operands(format, torch.float64)
    x = tokens_in(3, 16, dtype=torch.float64).requires_grad_()
    bias, up = tokens_in(8, dtype=torch.float64).requires_grad_(), tokens_in(3, 8).double()
    linear = linear_operator(parse_format(format).name)
    result = linear(x, *tensors, bias, 8, 16, [], "reference", "")
    grads = torch.autograd.grad(result, (x, bias), up)
    assert torch.allclose(grads[0], up @ weight) and torch.allclose(grads[1], up.sum(0))


@pytest.mark.parametrize("format", FORMATS)
def test_only_the_wanted_gradient_is_computed(format: str) -> None:
    weight, tensors, _, _ = operands(format, torch.float64)
    linear = linear_operator(parse_format(format).name)
    x = tokens_in(3, 16, dtype=torch.float64).requires_grad_()
    linear(x, *tensors, None, 8, 16, [], "reference", "").sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, weight.sum(0).expand(3, 16))


def marker(name: str, arrangement: tuple[str, ...] = ()) -> Implementation:
    return Implementation(name, _nothing, _nothing, arrangement)


def _nothing(*args: Any) -> None:
    return None


def test_a_dispatch_string_is_read_in_order() -> None:
    few, many, last = marker("few", ("a", "b")), marker("many", ("c",)), marker("last")
    rows = table("few<=4 many<=64 last", (last, few, many))
    assert rows == (
        (4, few, slice(0, 2)),
        (64, many, slice(2, 3)),
        (NO_LIMIT, last, slice(3, 3)),
    )


@pytest.mark.parametrize("dispatch", ["", "few<=4"])
def test_a_dispatch_string_must_serve_every_number(dispatch: str) -> None:
    with pytest.raises(AssertionError):
        table(dispatch, (marker("few"),))


@pytest.mark.parametrize(("tokens", "ran"), [(1, "cpu"), (4, "cpu"), (5, "reference")])
def test_the_number_of_tokens_decides_at_run_time(
    monkeypatch: pytest.MonkeyPatch, tokens: int, ran: str
) -> None:
    """Both are right, so the implementation that ran is seen by which functions it called."""
    _, tensors, arrangement, _ = operands("block:4x8")
    seen: list[str] = []
    watch_bmm(monkeypatch, seen)
    linear = linear_operator(parse_format("block:4x8").name)
    for shape in ((tokens, 16), (1, tokens, 16)):
        linear(tokens_in(*shape), *tensors, None, 8, 16, arrangement, "cpu<=4 reference", "")
    assert seen == (["cpu", "cpu"] if ran == "cpu" else [])


def watch_bmm(monkeypatch: pytest.MonkeyPatch, seen: list[str]) -> None:
    multiply = torch.bmm

    def watched(left: Tensor, right: Tensor) -> Tensor:
        seen.append("cpu")
        return multiply(left, right)

    monkeypatch.setattr(torch, "bmm", watched)


def test_no_tokens_run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tensors, arrangement, _ = operands("block:4x8")
    seen: list[str] = []
    watch_bmm(monkeypatch, seen)
    linear = linear_operator(parse_format("block:4x8").name)
    result = linear(tokens_in(2, 0, 16), *tensors, None, 8, 16, arrangement, "cpu", "")
    assert result.shape == (2, 0, 8) and not seen


def test_an_implementation_with_several_rows_has_one_arrangement() -> None:
    one = Implementation("one", torch.add, torch.add, ("a", "b"))
    two = Implementation("two", torch.add, torch.add, ("c",))
    rows = table("one<=4 two<=8 one", (one, two))
    assert rows == ((4, one, slice(0, 2)), (8, two, slice(2, 3)), (NO_LIMIT, one, slice(0, 2)))
