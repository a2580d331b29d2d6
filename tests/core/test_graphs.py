"""Work that is replayed: what it computes, and what is never replayed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.core import graphs
from secateur.core.graphs import Replayed
from tests.captures import stand_in

CPU = torch.device("cpu")


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return stand_in(monkeypatch)


def doubled(tree: Any) -> list[Tensor]:
    (x, more), factor = tree
    return [2 * x * factor, more + 1]


def test_a_call_that_comes_again_is_replayed_on_its_own_memory(replays: list[int]) -> None:
    double = Replayed(doubled, CPU)
    for number in range(5):
        x = torch.full((2, 3), float(number))
        first, second = double(((x, x + 1), 3))
        assert torch.equal(first, 6 * x) and torch.equal(second, x + 2)
        assert torch.equal(x, torch.full((2, 3), float(number)))
    assert replays == [4]  # the second call captures, and is the first that is replayed


@pytest.mark.parametrize(
    "other",
    [
        ((torch.ones(2, 4), torch.ones(2, 4)), 3),
        ((torch.ones(2, 3).double(), torch.ones(2, 3)), 3),
        ((torch.ones(2, 3), torch.ones(2, 3)), 5),
        ([torch.ones(2, 3), torch.ones(2, 3)], 3),
    ],
    ids=["shape", "dtype", "number", "tree"],
)
def test_what_is_unlike_the_capture_is_called(other: Any, replays: list[int]) -> None:
    double = Replayed(doubled, CPU)
    usual = ((torch.ones(2, 3), torch.ones(2, 3)), 3)
    for _ in range(2):
        double(usual)
    found, *_ = double(other)
    assert torch.equal(found, 2 * other[0][0] * other[1]) and replays == [1]
    double(usual)
    assert replays == [2]


def test_what_cannot_be_captured_is_called_for_ever(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refused(run: Callable[[], None], stream: object) -> Callable[[], None]:
        tried.append(1)
        raise RuntimeError("called a synchronizing operation")

    monkeypatch.setattr(graphs, "captured", refused)
    double, x = Replayed(doubled, CPU), torch.ones(1)
    for _ in range(4):
        assert float(double(((x, x), 1))[0]) == 2
    assert tried == [1] and replays == []


def test_nothing_is_captured_under_autocast_or_on_a_cpu(replays: list[int]) -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        double = Replayed(lambda tree: [tree[0] @ tree[0]], CPU)
        for _ in range(3):
            assert double([x])[0].dtype == torch.bfloat16
    assert replays == []


def test_a_cpu_is_not_captured() -> None:
    assert not graphs.can_capture(CPU) and not graphs.is_captured(CPU)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_gradients_are_replayed_on_weights_as_they_are() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64, device="cuda", requires_grad=True)
    calls: list[int] = []

    def gradient(tree: Any) -> list[Tensor | None]:
        calls.append(1)
        weight.grad = None
        error = (tree[0] @ weight).square().mean()
        error.backward()
        return [error.detach(), weight.grad]

    replayed = Replayed(gradient, weight.device)
    for seed in range(5):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        error, found = replayed([x.cuda()])
        own = weight.detach().clone().requires_grad_()
        expected = (x.cuda() @ own).square().mean()
        expected.backward()
        torch.testing.assert_close(error, expected.detach())
        torch.testing.assert_close(found, own.grad)
        with torch.no_grad():
            weight -= 0.1 * found
    assert len(calls) == 3  # called, tried out, captured


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_what_waits_is_called() -> None:
    def waits(tree: Any) -> list[Tensor]:
        return [tree[0][tree[0] > 0]]

    replayed = Replayed(waits, torch.device("cuda"))
    for count in range(4):
        x = torch.zeros(8, device="cuda")
        x[:count] = 1
        assert len(replayed([x])[0]) == count
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.get_sync_debug_mode() == 0
