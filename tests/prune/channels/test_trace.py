"""The graph of a model, and models that have none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.prune.channels.trace import layer_of, trace


def test_a_model_that_branches_on_values_says_so_and_keeps_its_mode() -> None:
    class Branch(nn.Linear):
        def forward(self, x: Any) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    model = Branch(2, 2)
    with pytest.raises(ValueError, match="needs the graph of Branch, torch.export cannot make it"):
        trace(model, torch.ones(3, 2))
    assert model.training


def test_operations_know_their_layer_and_changes_in_place_are_taken_apart() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    calls = [node for node in trace(model, torch.ones(3, 2)).nodes() if node.op == "call_function"]
    assert [str(node.target) for node in calls] == ["aten.linear.default", "aten.relu.default"]
    assert [layer_of(node) for node in calls] == ["0", "1"]


def test_a_result_whose_size_depends_on_values_is_named() -> None:
    class Chosen(nn.Linear):
        def forward(self, x: Any) -> Tensor:
            return super().forward(x)[x[:, 0].nonzero()[:, 0]]

    with pytest.raises(ValueError, match=r"the size of what aten.nonzero.default of .* on values"):
        trace(Chosen(2, 2), torch.ones(3, 2))
