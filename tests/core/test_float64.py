"""Devices without float64: float64 work runs on the CPU, with the results of any other device."""

import copy
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import secateur as sc
from secateur.allocation import owl
from secateur.core import float64
from secateur.core.float64 import float64_device, in_float64
from secateur.formats.format import parse_format, weight_error
from secateur.model.evaluate import compare, perplexity
from secateur.prune.decompose import decompose_
from secateur.reconstruct import compensation, refitted, swapped
from secateur.reconstruct.alps import _eigenvectors

# Stands for the CPU, while `torch.device("cpu")` plays a device without float64: a mode can tell
# from the index which tensors were moved here.
CPU = torch.device("cpu", 0)


class NoFloat64(TorchDispatchMode):
    """Refuses float64 tensors, except those moved to or made on the CPU, and their results."""

    def __init__(self) -> None:
        super().__init__()
        self._on_cpu: dict[int, weakref.ref[Tensor]] = {}

    def _is_on_cpu(self, x: Tensor) -> bool:
        reference = self._on_cpu.get(id(x))
        return x.dtype == torch.float64 or (reference is not None and reference() is x)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = kwargs.get("device")
        made_there = str(device) == "cpu:0" or (not inputs and device is None)  # the default device
        there = made_there or any(map(self._is_on_cpu, inputs))
        out = func(*args, **kwargs)
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor) and there and not any(x is one for one in inputs):
                self._on_cpu[id(x)] = weakref.ref(x)
            elif isinstance(x, Tensor) and x.dtype == torch.float64 and not there:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return out


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 32, generator=generator) for _ in range(4)]


def pruned(algorithm: Any, pattern: str = "2:4") -> Callable[[Path], Any]:
    def run(folder: Path) -> Any:
        net = model()
        sc.reconstruct_(net, pattern, algorithm, batches(), checkpoint=folder / "run")
        return net.state_dict()

    return run


def with_criterion(folder: Path) -> Any:
    net = model()
    report = sc.prune_(net, "2:4", sc.wanda, batches(), checkpoint=folder / "run")
    return net.state_dict(), [row.sparsity for row in report.layers]


def compared(folder: Path) -> Any:
    dense, net = model(), model()
    sc.prune_(net, "2:4")
    found = compare(net, dense, batches())
    return [torch.tensor([found.kl, found.top1])]


def perplexed(folder: Path) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    return [torch.tensor(perplexity(net, [torch.arange(20).view(2, 10)]).nll)]


def decomposed(folder: Path) -> Any:
    net = model()
    report = decompose_(net, "2:4", sc.sparsegpt, batches(), folder / "adapter", rank=4)
    return net.state_dict(), [torch.tensor([r.error_before, r.error]) for r in report.layers]


def allocated(folder: Path) -> Any:
    patterns = owl(model(), "unstructured:0.5", batches())
    return [torch.tensor([pattern.sparsity for pattern in patterns.values()])]


def distilled(folder: Path) -> Any:
    net = model()
    teacher = copy.deepcopy(net)
    sc.prune_(net, "2:4")
    sc.distil_(net, teacher, batches(), steps=4, checkpoint=folder / "state")
    return net.state_dict()


def packed_error(folder: Path) -> Any:
    weight = model()[0].weight.detach()
    packed = parse_format("int8_dynamic").pack(weight)
    x = batches()[0]
    return [
        torch.tensor(weight_error(weight, packed)),
        packed.format.implementations[-1].linear(x, packed, None),
    ]


RUNS = {
    "wanda": with_criterion,
    "sparsegpt": pruned(sc.sparsegpt),
    "swap": pruned(sc.swap(sc.wanda)),
    "swap by rows": pruned(sc.swap(sc.wanda), "unstructured:0.5"),
    "refit": pruned(sc.refit(sc.wanda)),
    "alps": pruned(sc.alps),
    "best": pruned(sc.best),
    "thorough": pruned(sc.thorough),
    "compare": compared,
    "perplexity": perplexed,
    "decompose": decomposed,
    "owl": allocated,
    "distil": distilled,
    "weight error": packed_error,
}


@pytest.mark.parametrize("name", RUNS)
def test_without_float64_all_runs_and_gives_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = RUNS[name](tmp_path / "with")
    monkeypatch.setattr(float64, "_has_float64", lambda device: device == CPU)
    monkeypatch.setattr(float64, "CPU", CPU)
    with NoFloat64():
        found = RUNS[name](tmp_path / "without")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_float32_that_fails_goes_on_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvectors and residuals that float32 misses, and a compensation, which is all float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 24, generator=generator)
    x[:, 12:] = x[:, :12] + 1e-4 * torch.randn(64, 12, generator=generator)  # nearly dependent
    gram, weight = x.T @ x / 64, torch.randn(8, 24, generator=generator)
    mask = sc.NM(2, 4).mask(weight.abs())
    monkeypatch.setattr(sys.modules["secateur.reconstruct.alps"], "MISSED", 0.0)

    def results() -> list[Tensor]:
        refit = refitted(weight, mask, gram, damping=0.0)
        return [
            *_eigenvectors(gram, 0.01),
            refit.weight,
            *compensation(weight, weight * mask, gram, 2),
            swapped(weight, mask, gram, sc.NM(2, 4)).weight,
        ]

    expected = results()
    monkeypatch.setattr(float64, "_has_float64", lambda device: device == CPU)
    monkeypatch.setattr(float64, "CPU", CPU)
    with NoFloat64():
        found = results()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_float64_stays_where_there_is_one() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert in_float64(x).tolist() == [1.0, 2.0] and in_float64(x).dtype == torch.float64
    assert float64_device(torch.device("meta")) == torch.device("meta")
    with NoFloat64(), pytest.raises(TypeError, match="float64"):
        (x * 2).double()  # the simulation does refuse float64


# Runs only on CUDA, which has float64.
CUDA = "kernels"


def test_nothing_becomes_float64_in_another_way() -> None:
    sources = Path(sc.__file__).parent.rglob("*.py")
    others = [path for path in sources if CUDA not in path.parts]
    assert len(others) > 100
    assert [path.name for path in others if ".double()" in path.read_text()] == []
