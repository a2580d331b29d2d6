"""Batches that are guessed, and models that cannot be exported."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.compat.torchao.structured_trace import guess_inputs, layer_of, trace


@pytest.mark.parametrize(
    "model, shape",
    [
        (nn.Sequential(nn.Linear(7, 2)), (3, 7)),
        (nn.Sequential(nn.Linear(7, 2), nn.Flatten(), nn.Linear(10, 2)), (3, 5, 7)),
        (nn.LSTM(4, 2), (3, 5, 4)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(1352, 2)), (3, 1, 28, 28)),
        (nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2)), (3, 5)),
    ],
)
def test_a_batch_is_guessed_by_the_first_layer(model: nn.Module, shape: tuple[int, ...]) -> None:
    before = torch.random.get_rng_state()
    batch = guess_inputs(model)
    assert batch.shape == shape
    model(batch)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_cannot_be_guessed_is_asked_for() -> None:
    odd = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(7, 2))
    for model in (odd, nn.Bilinear(2, 2, 2), nn.ReLU()):
        with pytest.raises(ValueError, match="prepare needs example_inputs for"):
            guess_inputs(model)


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
