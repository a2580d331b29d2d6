"""The model inside a wrapper, and the names of its parts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from secateur.core.wrappers import unwrapped, unwrapped_name

Wrap = Callable[[nn.Module], nn.Module]


def compiled(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return wrapped


WRAPS: list[Wrap] = [compiled, nn.DataParallel]


class Net(nn.Module):
    """A model whose own children have the names that wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 4)
        self._orig_mod = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.module(x) + self._orig_mod(x)
        return result


# Not compiled twice: torch.compile turns a compiled model into a function, which is no model.
@pytest.mark.parametrize("outer, inner", [(compiled, nn.DataParallel), (nn.DataParallel, compiled)])
def test_a_wrapped_model_is_the_very_model_inside(outer: Wrap, inner: Wrap) -> None:
    model = Net()
    assert unwrapped(model) is model
    assert unwrapped(inner(model)) is model
    assert unwrapped(outer(inner(model))) is model


@pytest.mark.parametrize("wrap", WRAPS)
def test_names_are_those_of_the_model_inside(wrap: Wrap) -> None:
    model = Net()
    wrapped = wrap(nn.DataParallel(model))
    names = [unwrapped_name(wrapped, name) for name in wrapped.state_dict()]
    assert names == list(model.state_dict())
    assert "module.weight" in names and "_orig_mod.0.bias" in names


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_part_that_is_wrapped_has_its_plain_name(wrap: Wrap) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    expected = list(model.state_dict())
    model[1] = wrap(model[1])
    assert list(model.state_dict()) != expected
    assert [unwrapped_name(model, name) for name in model.state_dict()] == expected
    assert unwrapped(model) is model


def test_a_name_that_the_model_lacks_stays() -> None:
    model = nn.DataParallel(nn.Linear(4, 4))
    assert unwrapped_name(model, "module.other.module.weight") == "other.module.weight"
    assert unwrapped_name(nn.Linear(4, 4), "module.weight") == "module.weight"
    assert unwrapped_name(model, "") == ""
