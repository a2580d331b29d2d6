"""What the prefill kernels refuse, and how they would be launched: all that needs no GPU."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.formats.kernels import gpu as gpu_checks
from secateur.formats.kernels.launch import Kernel
from secateur.formats.kernels.prefill24 import linear, multiply, why_not
from secateur.formats.kernels.prefill24.arrange import TILE_BYTES

GPU = torch.device("cuda:0")
BF16, INT8 = torch.bfloat16, torch.int8


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of capability 9.0, to ask about."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu_checks, "find_spec", lambda name: object())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(16, 16), (400, 1296), (4096, 32768)])
def test_what_they_take(gpu: None, shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert why_not(shape, dtype, GPU) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "told"),
    [
        ((32, 128), BF16, "cpu", "running it packed needs a CUDA GPU, "),
        ((32, 128), torch.float32, "cuda", "bfloat16 or float16, got torch.float32: cast the"),
        ((24, 128), BF16, "cuda", "that are multiples of 16, got 24 x 128: pad the layer with"),
        ((32, 120), BF16, "cuda", "that are multiples of 16, got 32 x 120: pad the layer with"),
        ((0, 128), BF16, "cuda", "that are multiples of 16, got 0 x 128"),
        ((32, 0), BF16, "cuda", "that are multiples of 16, got 32 x 0"),
        ((32, 32784), BF16, "cuda", "takes at most 32768 in_features, got 32784"),
    ],
)
def test_what_they_refuse(
    gpu: None, shape: tuple[int, int], dtype: torch.dtype, device: str, told: str
) -> None:
    problem = why_not(shape, dtype, torch.device(device))
    assert problem is not None and told in problem


@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)])
def test_only_hopper_has_the_instruction(
    gpu: None, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    problem = why_not((32, 128), BF16, GPU)
    has = f"needs compute capability 9.0, this GPU has {capability[0]}.{capability[1]}: "
    assert problem is not None and has in problem


def test_without_the_bindings_the_reason_names_the_extra(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_checks, "find_spec", lambda name: None)
    problem = why_not((32, 128), BF16, GPU)
    assert problem == "the prefill kernel needs cuda-bindings: pip install 'secateur[cuda]'"


def tiles_of(rows: int, columns: int) -> Tensor:
    return torch.zeros(-(-rows // 128), -(-columns // 128), TILE_BYTES, dtype=torch.uint8)


def test_a_bias_of_another_dtype_is_refused() -> None:
    x, scales = torch.zeros(1, 128, dtype=BF16), torch.zeros(16, 1, dtype=BF16)
    with pytest.raises(ValueError, match=r"bias of the input's torch\.bfloat16, got torch\.float3"):
        linear(x, tiles_of(16, 128), scales, torch.zeros(16), INT8)


def test_no_tokens_need_no_kernel() -> None:
    x, scales = torch.zeros(0, 128, dtype=BF16), torch.zeros(16, 1, dtype=BF16)
    result = linear(x, tiles_of(16, 128), scales, None, INT8)
    assert result.shape == (0, 16) and result.dtype == BF16


@pytest.fixture
def asked(gpu: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What would be launched, by entry, on a GPU that holds 66 clusters of two CTAs."""
    found = dict[str, dict[str, Any]]()
    names = ("grid", "cluster", "threads", "shared_bytes", "dependent", "arguments")

    def load(source: Any, defines: tuple[tuple[str, int], ...], device: object) -> Kernel:
        found[source.entry] = {"defines": dict(defines)}
        return Kernel(source.entry, (9, 0), 50, 0, 132, function=None, context=None)

    def prepare(kernel: Kernel, *sizes: object) -> Any:
        known = found[kernel.entry]
        known |= zip(names, sizes, strict=True)
        return lambda stream, *values: known.update(stream=stream, values=values)

    monkeypatch.setattr(Kernel, "most_clusters", lambda kernel, *sizes: 66)
    monkeypatch.setattr(multiply, "load", load)
    monkeypatch.setattr(multiply, "prepare", prepare)
    monkeypatch.setattr(multiply, "on", lambda device: nullcontext())
    monkeypatch.setattr(multiply, "tensor_map", lambda *sizes: ("map", *sizes))
    stream = SimpleNamespace(cuda_stream=5)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    for function in ("_quantise", "_multiply"):  # nothing is remembered, before or after
        monkeypatch.setattr(multiply, function, getattr(multiply, function).__wrapped__)
    return found


@pytest.mark.usefixtures("unchecked")  # nothing that is returned is a launch
def test_a_cta_rounds_a_token_and_the_product_fills_the_device(
    asked: dict[str, dict[str, Any]],
) -> None:
    x, scales = torch.zeros(300, 1296, dtype=torch.float16), torch.zeros(400, 1).half()
    tiles, bias = tiles_of(400, 1296), torch.zeros(400).half()
    y = linear(x, tiles, scales, bias, torch.float8_e4m3fn)
    rounds, multiplies = asked["quantise"], asked["prefill"]
    assert (rounds["grid"], rounds["threads"], rounds["shared_bytes"]) == (300, 128, 0)
    shared = {"FP8": 1, "HALF": 1}
    assert rounds["defines"] == shared | {"ITEMS": 2}
    assert multiplies["defines"] == shared | {"CLUSTER": 2, "STAGES": 4, "ACTIVATION": 0}
    assert (multiplies["grid"], multiplies["cluster"], multiplies["threads"]) == (132, 2, 384)
    assert rounds["dependent"] and multiplies["dependent"]
    assert rounds["stream"] == multiplies["stream"] == 5
    given, codes, token_scales, width = rounds["values"]
    assert given == x.data_ptr() and width == 1296
    assert multiplies["values"] == (
        ("map", codes, 300, 1296, 128, 128),  # each CTA of two copies half of a tile's tokens
        *(token_scales, tiles.data_ptr(), scales.data_ptr(), bias.data_ptr()),
        *(y.data_ptr(), 300, 400, 11),  # blocks of 128 columns
    )
    linear(x, tiles, scales, None, torch.int8)
    assert multiplies is not asked["prefill"] and asked["prefill"]["values"][4] == 0
    assert asked["prefill"]["defines"]["FP8"] == 0 != multiplies["defines"]["FP8"]
    assert asked["quantise"]["defines"]["HALF"] == 1
    for number, name in enumerate(("gelu", "gelu_tanh", "silu", "relu"), 1):
        linear(x, tiles, scales, None, torch.int8, name)
        assert asked["prefill"]["defines"]["ACTIVATION"] == number


@pytest.mark.parametrize(("width", "items"), [(16, 1), (1024, 1), (1040, 2), (32768, 32)])
def test_all_threads_of_a_cta_hold_a_token(width: int, items: int) -> None:
    """Eight inputs a load, 128 threads."""
    assert multiply.items_of(width) == items
