"""The dense weight of units: what is compiled, refused and launched, and on a GPU its bits."""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.formats import parse_format
from secateur.formats.contract import Packed
from secateur.formats.kernels import gpu as gpu_checks
from secateur.formats.kernels.decode24.arrange import FORMATS, Kind
from secateur.formats.kernels.decode24.expand import (
    SOURCE,
    defines,
    expand,
    multiply_expanded,
    why_not,
)
from secateur.formats.kernels.launch import Kernel
from secateur.formats.kernels.nvrtc import ARCHS, compile_cubin
from tests.formats.kernels.cubin_info import NEEDS_NVRTC, info
from tests.formats.weights import allowed_error, exact_linear, fitting_weight, tokens_on_gpu

module = sys.modules["secateur.formats.kernels.decode24.expand"]  # its name is the function's
BF16, HALF = torch.bfloat16, torch.float16
DTYPES = (BF16, HALF)
KINDS = (
    *((Kind.W16, False), (Kind.INT8, False), (Kind.FP8, False), (Kind.INT4, True)),
    *((Kind.W16_48, False), (Kind.INT4_48, True), (Kind.INT8_ALL, False), (Kind.INT4_ALL, True)),
)
WITHOUT_CLUSTERS = ("sm_80", "sm_86", "sm_89")
GPU = torch.device("cuda:0")
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def on_gpu(test: Any) -> Any:
    for mark in ON_GPU:
        test = mark(test)
    return test


@NEEDS_NVRTC
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "grouped"), KINDS)
@pytest.mark.parametrize("arch", ARCHS)
def test_it_compiles_to_whole_stores(
    arch: str, kind: Kind, grouped: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Sixteen bytes at a time, eight times; nothing lies in local memory."""
    portable = arch in WITHOUT_CLUSTERS
    found = info(compile_cubin(SOURCE, defines(kind, grouped, dtype, portable), arch), tmp_path)
    stores = [opcode for opcode in found.opcodes if opcode.startswith("STG")]
    assert len(stores) == 8 and all(".128" in opcode for opcode in stores)
    assert found.stack_bytes == 0
    assert any(opcode.startswith("ACQBULK") for opcode in found.opcodes) == (not portable)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of capability 8.0, to ask about."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(gpu_checks, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "told"),
    [
        ((16, 64), BF16, "cuda", None),
        ((32, 128), BF16, "cpu", "running it packed needs a CUDA GPU, "),
        ((32, 128), torch.float32, "cuda", "bfloat16 or float16, got torch.float32: cast the"),
        ((24, 128), BF16, "cuda", "expanded product needs out_features that is a multiple of 16"),
        ((32, 96), BF16, "cuda", "in_features of 64, got 32 x 96: pad the layer with zeros"),
    ],
)
def test_what_it_refuses(
    gpu: None, shape: tuple[int, int], dtype: torch.dtype, device: str, told: str | None
) -> None:
    problem = why_not(shape, dtype, torch.device(device))
    assert problem is None if told is None else problem is not None and told in problem


def test_an_older_gpu_is_refused(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    problem = why_not((32, 128), BF16, GPU)
    assert problem is not None and "needs compute capability 8.0, this GPU has 7.5: " in problem


def test_a_bias_of_another_dtype_is_refused() -> None:
    x, units = torch.zeros(1, 128, dtype=BF16), torch.zeros(1, 1, 2304, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"bias of the input's torch\.bfloat16, got torch\.float3"):
        multiply_expanded(x, units, None, torch.zeros(16), Kind.W16, False, 16)


@pytest.mark.usefixtures("unchecked")
def test_a_weight_that_does_not_fit_is_named_with_its_bytes() -> None:
    def no_room(*shape: int, dtype: torch.dtype) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    units = SimpleNamespace(device=GPU, shape=(512, 32, 800), new_empty=no_room)
    told = r"needs 67108864 bytes on cuda:0 while it runs, .* 8192 x 4096 in torch\.bf.*: free mem"
    with pytest.raises(torch.OutOfMemoryError, match=told):
        expand(units, None, Kind.INT4, True, BF16, 8192, 4096)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_a_warp_expands_a_unit(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    asked = dict[str, Any]()

    def load(source: Any, defines: tuple[tuple[str, int], ...], device: object) -> Kernel:
        asked["defines"] = dict(defines)
        return Kernel(source.entry, capability, 40, 0, 132, function=None, context=None)

    def prepare(kernel: Kernel, *sizes: object) -> Any:
        asked["sizes"] = sizes
        return lambda stream, *values: asked.update(stream=stream, values=values)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(module, "prepare", prepare)
    monkeypatch.setattr(module, "on", lambda device: nullcontext())
    monkeypatch.setattr(module, "_launch", module._launch.__wrapped__)
    stream = SimpleNamespace(cuda_stream=5)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    units = torch.zeros(17, 3, 1280, dtype=torch.uint8)
    scales = torch.ones(272, 1, dtype=HALF)
    dense = expand(units, scales, Kind.INT8, False, HALF, 272, 320)
    assert dense.shape == (272, 320) and dense.dtype == HALF
    wanted = {
        "KIND": 1,
        "STRUCTURE": 0,
        "GROUP_SCALES": 0,
        "HALF": 1,
        "PORTABLE": int(capability < (9, 0)),
    }
    assert asked["defines"] == wanted
    assert asked["sizes"][:3] == (13, 1, 128)  # 51 units, four to a CTA
    pointers = (units.data_ptr(), scales.data_ptr(), dense.data_ptr())
    assert asked["values"] == (*pointers, 51, 3, 320) and asked["stream"] == 5


# ---- on a GPU ------------------------------------------------------------------------------------


def packed_on_gpu(name: str, dtype: torch.dtype, shape: tuple[int, int]) -> Packed:
    return parse_format(name).pack(fitting_weight(name, *shape, dtype).cuda())


def arranged(packed: Packed) -> tuple[Tensor, Tensor | None, Kind, bool]:
    """The units, the rows' scales where units hold none, and how the kernel reads them."""
    decode = next(e for e in packed.format.implementations if e.name == "decode")
    units = decode.arranged(packed)["units"]
    kind, grouped = FORMATS[str(packed.format)]
    scaled = "scales" in packed.tensors and not grouped
    return units, packed["scales"] if scaled else None, kind, grouped


@on_gpu
@pytest.mark.parametrize("shape", [(16, 64), (272, 448), (1024, 2048)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_bits_are_those_of_the_dense_weight(
    name: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    packed = packed_on_gpu(name, dtype, shape)
    found = expand(*arranged(packed), dtype, *shape)
    assert torch.equal(found.view(torch.int16), packed.dense().view(torch.int16))


@on_gpu
@pytest.mark.parametrize("name", ["semi24", "semi24_int4", "semi48", "semi48_int4", "int4", "int8"])
def test_a_chain_in_a_graph_reuses_the_scratch_weight_safely(name: str) -> None:
    """Each layer overwrites the weight that the one before has just been multiplied by."""
    kind, grouped = FORMATS[name]
    layers = []
    for seed in range(4):
        weight = fitting_weight(name, 512, 512, BF16, seed).cuda()
        layers.append(parse_format(name).pack(weight / weight.float().norm() * 16))
    weights = [arranged(packed)[:2] for packed in layers]  # units, and the scales of rows
    x = tokens_on_gpu(100, 512, BF16)

    def chain(y: Tensor) -> Tensor:
        for units, scales in weights:
            y = multiply_expanded(y, units, scales, None, kind, grouped, 512)
        return y

    wanted = x
    for packed in layers:
        wanted = torch.nn.functional.linear(wanted, packed.dense())
        torch.cuda.synchronize()
    assert torch.equal(chain(x), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x)
    for _ in range(5):
        graph.replay()
        assert torch.equal(y, wanted)


@on_gpu
@pytest.mark.parametrize("name", FORMATS)
def test_the_product_is_right(name: str) -> None:
    packed = packed_on_gpu(name, BF16, (272, 448))
    units, scales, kind, grouped = arranged(packed)
    x, bias = tokens_on_gpu(77, 448, BF16), tokens_on_gpu(1, 272, BF16)[0]
    y = multiply_expanded(x, units, scales, bias, kind, grouped, 272)
    exact = exact_linear(x, packed.dense(), bias)
    assert (y.double() - exact).abs().max() <= allowed_error(x, packed.dense(), bias)
