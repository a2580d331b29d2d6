"""What a model reads that can be made smaller, and which units go."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.prune.channels import follow
from secateur.prune.shrink.dimensions import choose_together, find_dimensions
from tests.prune.channels.models import Recurrent, ResNet, images, lively, sequences
from tests.prune.shrink.models import language_model, rows


def found(model: nn.Module, batch: object) -> dict[str, tuple[str, int, int]]:
    dimensions, _ = find_dimensions(model, follow(model, batch))
    return {d.name: (d.kind, len(d.units), d.head) for d in dimensions}


LAYER = "model.layers.0."
KINDS = {
    "Llama": {"self_attn.o_proj": ("heads", 4, 4), "mlp.down_proj": ("width", 24, 1)},
    "Phi3": {"self_attn.o_proj": ("heads", 4, 2), "mlp.down_proj": ("width", 24, 1)},
    "Qwen3": {"self_attn.o_proj": ("heads", 4, 4), "mlp.down_proj": ("width", 24, 1)},
    "GptOss": {"self_attn.o_proj": ("heads", 4, 4)},
    "Olmoe": {},
}


@pytest.mark.parametrize("family", KINDS)
def test_heads_and_hidden_units_are_told_apart(family: str) -> None:
    model = language_model(family, num_hidden_layers=1) if family != "GptOss" else None
    model = model or language_model(family, num_hidden_layers=1, layer_types=["full_attention"])
    assert found(model, rows(1)[0]) == {LAYER + name: kind for name, kind in KINDS[family].items()}


def test_channels_that_images_and_gates_repeat_are_no_heads() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(x).flatten(1))

    assert found(lively(Flat()), images()) == {"head": ("width", 4, 1)}
    assert found(lively(ResNet()), images())["a.conv2"] == ("width", 10, 1)
    left = find_dimensions(model := lively(Recurrent()), follow(model, sequences(4)))[1]
    assert "LSTM" in left["lstm"]


def test_what_others_read_without_scores_stays() -> None:
    """The LSTM reads its hidden state as the head does, but its columns have no scores."""
    dimensions, left = find_dimensions(model := lively(Recurrent()), follow(model, sequences(4)))
    assert dimensions == []
    assert left["fc"] == "another layer reads the same channels, which has no scores"


def test_scores_compete_by_their_share_of_the_mean() -> None:
    small = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)  # 1/3, 2/3, 1, 2 of the mean
    large = torch.tensor([100.0, 150.0, 350.0, 200.0], dtype=torch.float64)  # 1/2, 3/4, 7/4, 1
    kept = choose_together([small, large], 0.5)
    assert [keep.tolist() for keep in kept] == [
        [False, False, True, True],
        [False, False, True, True],
    ]


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=4),
    st.floats(0, 0.99),
)
def test_a_share_of_all_is_met_and_each_keeps_one(scores: list[list[int]], share: float) -> None:
    totals = [torch.tensor(score, dtype=torch.float64) for score in scores]
    kept = choose_together(totals, share)
    n = sum(len(score) for score in scores)
    going = min(int(share * n + 0.5), n - len(scores))
    assert sum(int((~keep).sum()) for keep in kept) == going
    assert all(keep.any() for keep in kept)
