"""The dense view of a packed weight: everything reads it, nothing writes to it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from secateur.formats.read_only import ReadOnlyWeight
from tests.formats.weights import sparse_linear


def subtract(weight: Tensor) -> None:
    weight -= 1


def assign_data(weight: Tensor) -> None:
    weight.data = torch.zeros_like(weight)


def add_to_data(weight: Tensor) -> None:
    weight.data += 1  # how adapters are merged


def set_item(weight: Tensor) -> None:
    weight[0, 0] = 1


def write_out(weight: Tensor) -> None:
    torch.add(torch.ones(16, 24), 1, out=weight)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "zero_": lambda weight: weight.zero_(),
    "copy_": lambda weight: weight.copy_(torch.zeros(16, 24)),
    "-=": subtract,
    "data +=": add_to_data,
    "data =": assign_data,
    "item": set_item,
    "out": write_out,
    "detach": lambda weight: weight.detach().add_(1),
    "row": lambda weight: weight[0].mul_(2),
    "transposed": lambda weight: weight.t().fill_(0),
    "flat": lambda weight: weight.view(-1).zero_(),
    "data": lambda weight: weight.data.zero_(),
    "init": lambda weight: torch.nn.init.normal_(weight),
    "inference": lambda weight: weight.unflatten(0, (4, 4)).zero_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_no_way_of_writing_is_silent(
    write: Callable[[Tensor], object], mode: Callable[[], object]
) -> None:
    layer = sparse_linear("semi24")
    before = layer.weight.clone()
    with mode(), pytest.raises(ValueError, match="a packed weight is read-only, got a write by"):  # type: ignore[attr-defined]
        write(layer.weight)
    assert torch.equal(layer.weight, before)


def test_the_message_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"by add_: call unpack_\(model\) first .* keep the adapt"):
        sparse_linear("semi24").weight.data += 1


def test_results_are_ordinary_tensors() -> None:
    weight = sparse_linear("semi24").weight
    assert isinstance(weight, ReadOnlyWeight)
    for result in (weight + 0, weight.clone(), weight.abs(), weight.float().double()):
        assert type(result) is Tensor
        result.zero_()


def test_it_can_be_read_from_and_differentiated_through() -> None:
    weight = sparse_linear("semi24").weight
    x = torch.ones(2, 24, requires_grad=True)
    torch.nn.functional.linear(x, weight).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad[0], weight.clone().sum(0))
    other = torch.zeros(16, 24)
    other.copy_(weight)
    other += weight
    assert torch.equal(other, 2 * weight)
