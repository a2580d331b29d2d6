"""What the decode kernel refuses, and how it would be launched: all that needs no GPU."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from secateur.formats.kernels import gpu as gpu_checks
from secateur.formats.kernels.decode24 import multiply, why_not
from secateur.formats.kernels.decode24.arrange import Kind
from secateur.formats.kernels.decode24.config import SM_BYTES, Case, LaunchConfig
from secateur.formats.kernels.decode24.multiply import prepared
from secateur.formats.kernels.launch import Kernel

module = sys.modules["secateur.formats.kernels.decode24.multiply"]  # its name is the function's
GPU = torch.device("cuda:0")
BF16 = torch.bfloat16


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of capability 9.0, to ask about."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu_checks, "find_spec", lambda name: object())


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 64), (4096, 14336)])
def test_what_it_takes(gpu: None, shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> None:
    assert why_not(shape, dtype, GPU, tokens) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "tokens", "told"),
    [
        ((32, 128), BF16, "cpu", 1, "running it packed needs a CUDA GPU, "),
        ((32, 128), torch.float32, "cuda", 1, "needs bfloat16 or float16, got torch.float32: cast"),
        ((24, 128), BF16, "cuda", 1, "out_features that is a multiple of 16 and in_features of 64"),
        ((32, 96), BF16, "cuda", 1, "in_features of 64, got 32 x 96: pad the layer with zeros"),
        ((32, 128), BF16, "cuda", 65, "serves at most 64 tokens, got 65"),
    ],
)
def test_what_it_refuses(
    gpu: None, shape: tuple[int, int], dtype: torch.dtype, device: str, tokens: int, told: str
) -> None:
    problem = why_not(shape, dtype, torch.device(device), tokens)
    assert problem is not None and told in problem


def test_what_the_machine_lacks(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gpu_checks, "find_spec", lambda name: None)
        problem = why_not((32, 128), BF16, GPU, 1)
        assert problem == "the decode kernel needs cuda-bindings: pip install 'secateur[cuda]'"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    problem = why_not((32, 128), BF16, GPU, 1)
    assert problem is not None and "compute capability 8.0" in problem and "has 7.5" in problem
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert why_not((32, 128), BF16, GPU, 1) is None


def test_a_bias_of_another_dtype_is_refused() -> None:
    x, units = torch.zeros(1, 128, dtype=BF16), torch.zeros(1, 1, 2304, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"bias of the input's torch\.bfloat16, got torch\.float3"):
        multiply(x, units, None, torch.zeros(16), Kind.W16, False, 16)


CASE = Case(Kind.INT4, True, BF16, 4096, 4096, 2)
CONFIG = LaunchConfig(2, 4, 2, 1, 1, 4, 1)


def launched(
    monkeypatch: pytest.MonkeyPatch,
    case: Case = CASE,
    config: LaunchConfig = CONFIG,
    dependent: bool = True,
    capability: tuple[int, int] = (9, 0),
) -> dict[str, Any]:
    """What `prepared` asks for, on a GPU that holds 66 clusters of two CTAs."""
    asked: dict[str, Any] = {}

    def count(kernel: Kernel, cluster: int, threads: int, shared_bytes: int) -> int:
        asked["counted"] = (cluster, threads, shared_bytes)
        return 132 // cluster

    def load(source: object, defines: tuple[tuple[str, int], ...], device: object) -> Kernel:
        asked["defines"] = dict(defines)
        return Kernel("decode", capability, 50, 0, 132, function=None, context=None)

    def prepare(kernel: object, *sizes: object) -> SimpleNamespace:
        names = ("grid", "cluster", "threads", "shared_bytes", "dependent", "arguments")
        asked.update(zip(names, sizes, strict=True))
        return SimpleNamespace()

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(Kernel, "most_clusters", count)
    monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(module, "prepare", prepare)
    prepared(case, config, GPU, dependent)
    return asked


@pytest.mark.usefixtures("unchecked")  # nothing that is returned is a launch
def test_the_grid_fills_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 row tiles by fours are 64 clusters; the device holds 66."""
    asked = launched(monkeypatch)
    assert (asked["grid"], asked["cluster"], asked["threads"]) == (132, 2, 256)
    assert asked["counted"] == (2, 256, SM_BYTES // 2)  # one CTA on an SM
    assert asked["shared_bytes"] == SM_BYTES // 3 > CONFIG.shared_bytes(CASE)  # never three
    assert asked["arguments"] == "PPPPPiii"
    assert asked["dependent"] is True and asked["defines"]["PORTABLE"] == 0
    deep = LaunchConfig(2, 4, 2, 1, 4, 4, 1)
    assert launched(monkeypatch, config=deep)["shared_bytes"] == deep.shared_bytes(CASE) > 10**5
    many = Case(Kind.INT4, True, BF16, 2 * 4096, 4096, 2)
    assert launched(monkeypatch, many)["grid"] == 256  # all that have rows


@pytest.mark.usefixtures("unchecked")
def test_dependent_launch_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched(monkeypatch, dependent=False)["dependent"] is False
    monkeypatch.setenv("SECATEUR_DEPENDENT", "0")
    assert launched(monkeypatch)["dependent"] is False


@pytest.mark.usefixtures("unchecked")
def test_older_gpus_get_the_portable_form(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = launched(monkeypatch, config=LaunchConfig(1, 4, 2, 1, 1, 3, 1, 3), capability=(8, 9))
    assert asked["defines"]["PORTABLE"] == 1
    assert "counted" not in asked and asked["dependent"] is False
    assert asked["grid"] == 64
