"""The registered operators: opcheck, dispatch by tokens, and gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.formats import parse_format
from secateur.formats.contract import (
    Arrangement,
    Gradients,
    Implementation,
    Packed,
    held_tensors,
)
from secateur.formats.op import (
    NO_LIMIT,
    arranged_tensors,
    linear_operator,
    register,
    table,
    unpack_operator,
)
from secateur.formats.reference import GRADIENTS, REFERENCE
from tests.formats.weights import (
    DYNAMIC,
    EXACT,
    FORMATS,
    QUANTISED,
    fitting_weight,
    packed_weight,
    tokens_in,
)
from tests.toy import Toy


def operands(
    format: str, dtype: torch.dtype = torch.float32, arranged: bool = True
) -> tuple[Tensor, list[Any], str]:
    """The dense weight, its tensors as the operators take them and the implementation's name.

    The tensors are those that are stored, None where they are not held, and a list of the others,
    or None.
    """
    weight = fitting_weight(format, 8, 16, dtype)
    packed = packed_weight(format, weight)
    here = [runs for runs in packed.format.implementations if runs.why_not(packed, 1) is None]
    runs = here[0 if arranged else -1]
    held = {**packed.tensors} if not runs.restores else {}
    held |= runs.arranged(packed).tensors
    stored = packed.format.tensors
    others = [held[name] for name in arranged_tensors(runs.name, packed.format)]
    return weight, [*map(held.get, stored), others or None], runs.name


# torch 2.14 looks at the gradient of a clone that opcheck makes, and hides its own warning about it
# only from those for whom warnings are no errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_of_the_linear(format: str, bias: bool) -> None:
    _, held, name = operands(format)
    x = tokens_in(3, 16).requires_grad_()
    offset = tokens_in(8, seed=3).requires_grad_() if bias else None
    linear = linear_operator(parse_format(format).name)
    torch.library.opcheck(linear, (x, *held, offset, 8, 16, name, ""))
    _, held, _ = operands(format, arranged=False)
    x = tokens_in(3, 1, 16).requires_grad_()
    torch.library.opcheck(linear, (x, *held, offset, 8, 16, "reference", ""))


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_of_unpack(format: str) -> None:
    for arranged in (True, False):
        weight, held, name = operands(format, arranged=arranged)
        unpack = unpack_operator(parse_format(format).name)
        rest = (*held, 8, 16, name, weight.dtype)
        torch.library.opcheck(unpack, rest)
        assert torch.equal(unpack(*rest), weight)


@pytest.mark.parametrize("arranged", [True, False])
@pytest.mark.parametrize("format", EXACT + QUANTISED)
def test_gradients_of_input_and_bias(format: str, arranged: bool) -> None:
    weight, held, name = operands(format, torch.float64, arranged)
    linear = linear_operator(parse_format(format).name)
    x = tokens_in(3, 16, dtype=torch.float64).requires_grad_()
    bias = tokens_in(8, dtype=torch.float64, seed=3).requires_grad_()

    def run(x: Tensor, bias: Tensor) -> Tensor:
        result: Tensor = linear(x, *held, bias, 8, 16, name, "")
        return result

    assert torch.autograd.gradcheck(run, (x, bias))
    assert torch.autograd.gradgradcheck(run, (x, bias))
    up = tokens_in(3, 8, dtype=torch.float64, seed=4)
    grads = torch.autograd.grad(run(x, bias), (x, bias), up)
    assert torch.allclose(grads[0], up @ weight)
    assert torch.allclose(grads[1], up.sum(0))


@pytest.mark.parametrize("format", EXACT)
def test_gradients_of_values(format: str) -> None:
    """They are what the dense gradient has at their places; and there are gradients of them."""
    weight, held, _ = operands(format, torch.float64, arranged=False)
    linear = linear_operator(parse_format(format).name)
    x, up = tokens_in(3, 16, dtype=torch.float64), tokens_in(3, 8, dtype=torch.float64, seed=4)
    values, *others = held

    def run(x: Tensor, values: Tensor) -> Tensor:
        result: Tensor = linear(x, values, *others, None, 8, 16, "reference", "")
        return result

    leaves = x.requires_grad_(), values.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(run, leaves) and torch.autograd.gradgradcheck(run, leaves)
    (found,) = torch.autograd.grad(run(*leaves), leaves[1:], up)
    changed = parse_format(format).pack(weight).tensors | {"values": found}
    dense = parse_format(format).unpack(replace(parse_format(format).pack(weight), tensors=changed))
    assert torch.allclose(dense, torch.where(dense != 0, up.t() @ x.detach(), 0.0))
    assert bool((dense != 0)[weight != 0].all())


def test_an_implementation_brings_gradients_for_its_numbers_of_tokens() -> None:
    """Where it has none the reference's run; both are given tokens row by row."""
    asked: list[tuple[int, ...]] = []

    def of_input(grad: Tensor, packed: Packed) -> Tensor:
        asked.append(tuple(grad.shape))
        return 2 * GRADIENTS.of_input(grad, packed)

    def of_values(grad: Tensor, x: Tensor, packed: Packed) -> Tensor:
        asked.append((*grad.shape, *x.shape))
        return 3 * GRADIENTS.of_values(grad, x, packed)

    own = replace(REFERENCE, name="own", gradients=Gradients(of_input, of_values))
    format = Toy("own_gradients", (own, REFERENCE))
    register(format)
    linear = linear_operator(format.name)
    values, weight = tokens_in(8, 8), torch.zeros(8, 16)
    weight[:, ::2] = values
    for tokens, times in ((4, (2.0, 3.0)), (5, (1.0, 1.0))):
        x = tokens_in(1, tokens, 16).requires_grad_()
        leaves = x, values.clone().requires_grad_()
        up = tokens_in(1, tokens, 8, seed=4)
        result = linear(x, leaves[1], None, None, 8, 16, "own<=4 reference", "")
        found = torch.autograd.grad(result, leaves, up)
        assert torch.allclose(found[0], times[0] * (up @ weight), atol=1e-5)
        dense = up[0].t() @ x[0].detach()
        assert torch.allclose(found[1], times[1] * dense[:, ::2], atol=1e-5)
    assert asked == [(4, 8), (4, 8, 4, 16)]


@pytest.mark.parametrize("format", DYNAMIC)
def test_a_dynamic_format_hands_gradients_straight_through(format: str) -> None:
    """Rounding is a staircase, whose slope is 0 or infinite; the gradient is that without it."""
    weight, held, _ = operands(format, torch.float64, arranged=False)
    x = tokens_in(3, 16, dtype=torch.float64).requires_grad_()
    bias, up = tokens_in(8, dtype=torch.float64).requires_grad_(), tokens_in(3, 8).double()
    linear = linear_operator(parse_format(format).name)
    result = linear(x, *held, bias, 8, 16, "reference", "")
    grads = torch.autograd.grad(result, (x, bias), up)
    assert torch.allclose(grads[0], up @ weight) and torch.allclose(grads[1], up.sum(0))


@pytest.mark.parametrize("format", FORMATS)
def test_only_the_wanted_gradient_is_computed(format: str) -> None:
    weight, held, _ = operands(format, torch.float64, arranged=False)
    linear = linear_operator(parse_format(format).name)
    x = tokens_in(3, 16, dtype=torch.float64).requires_grad_()
    linear(x, *held, None, 8, 16, "reference", "").sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, weight.sum(0).expand(3, 16))


def marker(name: str, arrangement: Arrangement | None = None) -> Implementation:
    return Implementation(name, _nothing, _nothing, arrangement)


def _nothing(*args: Any) -> None:
    return None


def test_a_dispatch_string_is_read_in_order() -> None:
    few, many, last = marker("few"), marker("many"), marker("last")
    rows = table("few<=4 many<=64 few<=90 last", (last, few, many))
    assert rows == ((4, few), (64, many), (90, few), (NO_LIMIT, last))


WHOLE = Arrangement(("units",), _nothing, _nothing)
BESIDE = Arrangement(("values", "rows"), _nothing)
OPAQUE = Arrangement(("blob",), _nothing)


@pytest.mark.parametrize(
    ("dispatch", "held"),
    [
        ("last", ["values"]),
        ("whole", ["units"]),
        ("whole<=4 last", ["units"]),  # the reference restores what it needs
        ("last<=4 whole", ["units"]),
        ("beside<=4 last", ["values", "rows"]),
        ("opaque", ["values", "blob"]),
        ("whole<=4 opaque", ["units", "blob"]),
        ("whole<=4 opaque<=8 whole", ["units", "blob"]),
        ("whole<=4 beside", ["units", "values", "rows"]),
    ],
)
def test_a_layer_holds_a_weight_once_unless_something_reads_it_otherwise(
    dispatch: str, held: list[str]
) -> None:
    every = (marker("whole", WHOLE), marker("beside", BESIDE), marker("opaque", OPAQUE))
    format = Toy("marked", (*every, marker("last")))
    chosen = [entry for _, entry in table(dispatch, format.implementations)]
    assert list(held_tensors(format, chosen)) == held
    assert list(arranged_tensors(dispatch, format)) == [n for n in held if n != "values"]


@pytest.mark.parametrize("dispatch", ["", "few<=4"])
def test_a_dispatch_string_must_serve_every_number(dispatch: str) -> None:
    with pytest.raises(AssertionError):
        table(dispatch, (marker("few"),))


@pytest.mark.usefixtures("no_cpu_kernels")
@pytest.mark.parametrize(("tokens", "ran"), [(1, "cpu"), (4, "cpu"), (5, "reference")])
def test_the_number_of_tokens_decides_at_run_time(
    monkeypatch: pytest.MonkeyPatch, tokens: int, ran: str
) -> None:
    """Both are right, so the implementation that ran is seen by which functions it called."""
    _, held, _ = operands("block:4x8")
    seen: list[str] = []
    watch_bmm(monkeypatch, seen)
    linear = linear_operator(parse_format("block:4x8").name)
    for shape in ((tokens, 16), (1, tokens, 16)):
        linear(tokens_in(*shape), *held, None, 8, 16, "cpu<=4 reference", "")
    assert seen == (["cpu", "cpu"] if ran == "cpu" else [])


def watch_bmm(monkeypatch: pytest.MonkeyPatch, seen: list[str]) -> None:
    multiply = torch.bmm

    def watched(left: Tensor, right: Tensor) -> Tensor:
        seen.append("cpu")
        return multiply(left, right)

    monkeypatch.setattr(torch, "bmm", watched)


def test_no_tokens_run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, held, _ = operands("block:4x8")
    seen: list[str] = []
    watch_bmm(monkeypatch, seen)
    linear = linear_operator(parse_format("block:4x8").name)
    result = linear(tokens_in(2, 0, 16), *held, None, 8, 16, "cpu", "")
    assert result.shape == (2, 0, 8) and not seen
