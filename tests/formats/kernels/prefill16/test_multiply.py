"""What the prefill kernel refuses, and how it would be launched: all that needs no GPU."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.formats.kernels import gpu as gpu_checks
from secateur.formats.kernels.decode24.arrange import Kind, unit_bytes
from secateur.formats.kernels.launch import Kernel
from secateur.formats.kernels.prefill16 import ACTIVATIONS, multiply, why_not
from secateur.formats.kernels.prefill16.config import Tile

module = sys.modules["secateur.formats.kernels.prefill16.multiply"]  # its name is the function's
GPU = torch.device("cuda:0")
BF16, HALF = torch.bfloat16, torch.float16


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of capability 9.0, to ask about."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu_checks, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "told"),
    [
        ((16, 64), BF16, "cuda", None),
        ((4096, 14336), HALF, "cuda", None),
        ((32, 128), BF16, "cpu", "running it packed needs a CUDA GPU, "),
        ((32, 128), torch.float32, "cuda", "bfloat16 or float16, got torch.float32: cast the"),
        ((24, 128), BF16, "cuda", "prefill kernel needs out_features that is a multiple of 16"),
        ((32, 96), BF16, "cuda", "in_features of 64, got 32 x 96: pad the layer with zeros"),
    ],
)
def test_what_it_refuses(
    gpu: None, shape: tuple[int, int], dtype: torch.dtype, device: str, told: str | None
) -> None:
    problem = why_not(shape, dtype, torch.device(device))
    assert problem is None if told is None else problem is not None and told in problem


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


def units_of(rows: int, columns: int, kind: Kind = Kind.W16, grouped: bool = False) -> Tensor:
    size = unit_bytes(kind, grouped)
    return torch.zeros(rows // 16, -(-columns // 128), size, dtype=torch.uint8)


def test_a_bias_of_another_dtype_is_refused() -> None:
    x = torch.zeros(1, 128, dtype=BF16)
    with pytest.raises(ValueError, match=r"bias of the input's torch\.bfloat16, got torch\.float3"):
        multiply(x, units_of(16, 128), None, torch.zeros(16), Kind.W16, False, 16)


def test_no_tokens_need_no_kernel() -> None:
    x = torch.zeros(0, 128, dtype=BF16)
    result = multiply(x, units_of(16, 128), None, None, Kind.W16, False, 16)
    assert result.shape == (0, 16) and result.dtype == BF16


@pytest.fixture
def asked(gpu: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would be launched with the tile under `tile`, on a GPU that holds 66 clusters of two."""
    found: dict[str, Any] = {"tile": Tile(1, 256, 2, 3, 4, 2)}
    names = ("grid", "cluster", "threads", "shared_bytes", "dependent", "arguments")

    def load(source: Any, defines: tuple[tuple[str, int], ...], device: object) -> Kernel:
        found["defines"] = dict(defines)
        return Kernel(source.entry, (9, 0), 168, 0, 132, function=None, context=None)

    def prepare(kernel: Kernel, *sizes: object) -> Any:
        found.update(zip(names, sizes, strict=True))
        return lambda stream, *values: found.update(stream=stream, values=values)

    monkeypatch.setattr(Kernel, "most_clusters", lambda kernel, cluster, *sizes: 132 // cluster)
    monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(module, "prepare", prepare)
    monkeypatch.setattr(module, "on", lambda device: nullcontext())
    monkeypatch.setattr(module, "tensor_map", lambda *sizes: ("map", *sizes))
    monkeypatch.setattr(module, "pieces_map", lambda *sizes: ("pieces", *sizes))
    monkeypatch.setattr(module, "_tile", lambda case, device: found["tile"])
    monkeypatch.setattr(module, "_launch", module._launch.__wrapped__)
    stream = SimpleNamespace(cuda_stream=5)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return found


@pytest.mark.usefixtures("unchecked")  # nothing that is returned is a launch
def test_what_the_kernel_is_told(asked: dict[str, Any]) -> None:
    x, scales, bias = torch.zeros(300, 448, dtype=HALF), torch.ones(272, 1).half(), None
    units = units_of(272, 448, Kind.INT8)
    y = multiply(x, units, scales, bias, Kind.INT8, False, 272)
    assert (asked["grid"], asked["cluster"], asked["threads"]) == (132, 2, 384)
    assert asked["dependent"] and asked["stream"] == 5
    defines = {"KIND": 1, "STRUCTURE": 0, "GROUP_SCALES": 0, "HALF": 1, "ACTIVATION": 0}
    defines |= {"ROW_BLOCKS": 1, "TOKENS": 256, "SPLITS": 2}
    assert asked["defines"] == defines | {"A_STAGES": 3, "B_STAGES": 4, "OUT_BUFFERS": 2}
    assert asked["shared_bytes"] == asked["tile"].shared_bytes(1280)
    assert asked["values"] == (
        ("map", x.data_ptr(), 300, 896, 256, 128),  # bytes of a row, boxes of 64 columns
        ("map", y.data_ptr(), 300, 544, 64, 128),
        ("pieces", units.data_ptr(), 17, 4, 1280, 8, 1),  # the last unit is half
        *(scales.data_ptr(), 0, 300, 272, 4),
    )


@pytest.mark.usefixtures("unchecked")
def test_units_of_16_bits_are_copied_in_two_pieces(asked: dict[str, Any]) -> None:
    asked["tile"] = Tile(2, 128, 1, 3, 5, 2)
    x, units = torch.zeros(300, 448, dtype=BF16), units_of(272, 448)
    bias = torch.zeros(272, dtype=BF16)
    multiply(x, units, None, bias, Kind.W16, False, 272, "silu")
    inputs, results, pieces, *rest = asked["values"]
    assert inputs[4:] == (128, 128) and asked["cluster"] == 1
    assert results[4:] == (64, 128) and pieces[2:] == (17, 8, 1152, 16, 2)
    assert rest == [0, bias.data_ptr(), 300, 272, 4]
    for number, name in enumerate(ACTIVATIONS, 1):
        multiply(x, units, None, bias, Kind.W16, False, 272, name)
        assert asked["defines"]["ACTIVATION"] == number


@pytest.mark.usefixtures("unchecked")
def test_no_box_is_larger_than_the_inputs(asked: dict[str, Any]) -> None:
    """The copy engine takes long over what lies beyond a matrix."""
    for tokens, box in ((65, 65), (256, 256), (257, 256)):
        x = torch.zeros(tokens, 448, dtype=BF16)
        multiply(x, units_of(272, 448), None, None, Kind.W16, False, 272)
        assert asked["values"][0][2:] == (tokens, 896, box, 128)


@pytest.mark.usefixtures("unchecked")
def test_operands_that_cannot_be_read_by_16_bytes_are_copied(asked: dict[str, Any]) -> None:
    x = torch.zeros(300 * 448 + 1, dtype=BF16)[1:].view(300, 448)
    bias = torch.zeros(273, dtype=BF16)[1:]
    multiply(x, units_of(272, 448), None, bias, Kind.W16, False, 272)
    assert asked["values"][0][1] % 16 == 0 != x.data_ptr() % 16
    assert asked["values"][4] % 16 == 0 != bias.data_ptr() % 16
