"""Batches that are guessed from the layers that read a model's inputs."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.prune.channels.guess import guess_inputs


class Net(nn.Module):
    """A convolutional net as tutorials write it; the layers are registered from last to first."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.head = nn.Linear(4 * ((side - 2) // 2) ** 2, 3)
        self.Conv2d = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.Conv2d(x)), 2)
        return self.head(x.view(x.size(0), -1))


class Pair(nn.Module):
    """Tokens, a picture of them and numbers beside; more is optional."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.words = nn.Linear(2, 8), nn.Embedding(20, 8)
        self.picture = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 5))

    def forward(
        self, words: Tensor, picture: Tensor, numbers: Tensor, scale: float | None = None
    ) -> Tensor:
        seen = self.picture(picture).mean((2, 3)) + self.numbers(numbers)
        if scale is not None:
            seen = seen * scale
        return self.words(words).mean(1) + seen


class Steps(nn.Module):
    """A first state of its own, and a step that Python counts."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, input: Tensor) -> Tensor:
        first = torch.zeros(1, input.size(0), 6)
        hidden, _ = self.lstm(input, (first, first))
        return self.out(hidden[:, -1, :])


class Branch(nn.Module):
    """What no tracing follows."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x.sum() > 0 else self.other(x)


class SimpleConv2d(nn.Module):
    """A name that sounds like a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


class Optional(nn.Module):
    """As models of transformers: every input has a default, and no tracing follows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)

    def forward(self, tokens: Tensor | None = None, embedded: Tensor | None = None) -> Tensor:
        if (tokens is None) == (embedded is None):
            raise ValueError("one of the two")
        return self.embed(tokens) if embedded is None else embedded


class Turned(nn.Module):
    """Channels come last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x.permute(0, 3, 1, 2))


class Rated(nn.Module):
    """One number for each sample, of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(9, 4), nn.Embedding(7, 4)
        self.out = nn.Linear(8, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.out(torch.cat([self.user(user), self.item(item)], 1))


@pytest.mark.parametrize(
    "model, shapes",
    [
        (nn.Sequential(nn.Linear(7, 2)), [(3, 7)]),
        (nn.Linear(7, 2), [(3, 7)]),
        (nn.Sequential(nn.Linear(7, 2), nn.Flatten(), nn.Linear(10, 2)), [(3, 5, 7)]),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 2)), [(3, 784)]),
        (nn.LSTM(4, 2), [(3, 5, 4)]),
        (nn.Sequential(nn.LayerNorm(4), nn.GRU(4, 2)), [(3, 5, 4)]),
        (Steps(), [(3, 5, 4)]),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(1352, 2)), [(3, 1, 28, 28)]),
        (nn.Sequential(nn.Conv1d(5, 2, 3), nn.Flatten(), nn.Linear(2 * 48, 2)), [(3, 5, 50)]),
        (nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU()), [(3, 1, 32, 32, 32)]),
        (nn.Sequential(nn.ConvTranspose2d(6, 2, 4), nn.Conv2d(2, 1, 3)), [(3, 6, 32, 32)]),
        (Net(28), [(3, 1, 28, 28)]),
        (Net(45), [(3, 1, 44, 44)]),
        (Net(200), [(3, 1, 200, 200)]),
        (SimpleConv2d(), [(3, 1, 32, 32)]),
        (nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2)), [(3, 5)]),
        (Pair(), [(3, 5), (3, 3, 32, 32), (3, 2)]),
        (Branch(), [(3, 7)]),
        (Optional(), [(3, 5)]),
        (nn.Sequential(nn.Unflatten(1, (1, 28)), nn.Conv2d(1, 2, 3)), [(3, 28, 28)]),
        (Turned(), [(3, 32, 32, 4)]),
        (Rated(), [(3,), (3,)]),
    ],
)
def test_a_batch_is_guessed_by_what_reads_each_input(
    model: nn.Module, shapes: list[tuple[int, ...]]
) -> None:
    before = torch.random.get_rng_state()
    state = copy.deepcopy(model.state_dict())
    batch = guess_inputs(model)
    assert [tuple(tensor.shape) for tensor in batch] == shapes
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    model(*batch)
    model.load_state_dict(state)


def test_a_guess_has_the_model_s_precision_and_no_two_samples_alike() -> None:
    (batch,) = guess_inputs(nn.Sequential(nn.Conv2d(1, 2, 3)).double())
    assert batch.dtype == torch.float64
    assert not torch.equal(batch[0], batch[1])


def test_what_cannot_be_guessed_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    class Three(nn.Linear):
        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return super().forward(a) + b

    odd = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(7, 2))
    for model in (odd, nn.Bilinear(2, 2, 2), nn.ReLU(), Three(2, 2)):
        with pytest.raises(ValueError, match="needs example inputs, it runs none") as error:
            guess_inputs(model)
        assert "\n" not in str(error.value)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_model_that_keeps_what_it_computes_keeps_nothing_of_a_guess() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.last: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.layer(x)
            return self.last

    model = Keeps()
    guess_inputs(model)
    assert model.last is None
