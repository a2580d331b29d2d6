"""How much a block changes what passes through it."""

import math

import pytest
import torch
from torch import Tensor, nn

from secateur.prune.shrink.blocks import chain_of, influence
from tests.prune.shrink.models import language_model, rows


class Turn(nn.Module):
    """A rotation of pairs of numbers by an angle, so that the cosine is that of the angle."""

    def __init__(self, angle: float) -> None:
        super().__init__()
        c, s = math.cos(angle), math.sin(angle)
        self.linear = nn.Linear(2, 2, bias=False)
        self.linear.weight = nn.Parameter(torch.tensor([[c, -s], [s, c]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_the_influence_is_one_minus_the_cosine() -> None:
    angles = [0.1, 1.5, 0.7]
    model = nn.Sequential(nn.Sequential(*map(Turn, angles)))
    name, blocks = chain_of(model)
    batches = [torch.randn(4, 5, 2, dtype=torch.float64), torch.randn(2, 5, 2, dtype=torch.float64)]
    expected = [1 - math.cos(angle) for angle in angles]
    assert name == "0" and list(influence(model, blocks, batches).values()) == pytest.approx(
        expected
    )


def test_positions_of_all_batches_count_alike() -> None:
    model = language_model("Llama")
    _, blocks = chain_of(model)
    one = influence(model, blocks, [torch.cat(rows(3))])
    three = influence(model, blocks, rows(3))
    assert list(three.values()) == pytest.approx(list(one.values()), rel=1e-5)


def test_a_block_that_changes_shapes_stays() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)))
    _, blocks = chain_of(model)
    with pytest.raises(
        ValueError, match=r"0\.0 makes \[3, 6\] of \[3, 4\], so that the model needs"
    ):
        influence(model, blocks, [torch.randn(3, 4)])


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(
        ValueError, match="this Linear has no list of equal blocks: leave blocks at 0"
    ):
        chain_of(nn.Linear(3, 3))
