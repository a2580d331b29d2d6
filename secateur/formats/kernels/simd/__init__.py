"""The kernels for a CPU: a library of C functions without torch in it, its threads torch's own.

It is compiled when the wheel is built (`hatch_build.py`), once for each body, which is a set of
instructions: `avx512_vnni`, `avx512`, `avx2`, or `scalar` for any processor. The best that this one
has runs; `SECATEUR_CPU_BODY` names another, or `none`. Functions get addresses and sizes, checked
here; the address of torch's `torch_parallel_for` (`torch/csrc/stable/c/shim.h`) among them, so that
one build serves every torch from 2.10 on.
"""

import ctypes
import hashlib
import os
import warnings
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int8, Int32, Shaped, UInt8
from torch import Tensor

FOLDER = Path(__file__).parent
LIBRARY = "kernels.so"
SOURCES = ("kernels.cpp", "vectors.h")
CHOICE = "SECATEUR_CPU_BODY"
AVX2 = ("avx2", "fma3", "f16c")
AVX512 = (*AVX2, "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq")
NEEDS = {  # of the processor, by body, the best first
    "avx512_vnni": (*AVX512, "avx512_vbmi", "avx512_vnni"),
    "avx512": AVX512,
    "avx2": AVX2,
    "scalar": (),
}
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Kind in kernels.cpp
INT8, FLOAT8, INT4 = 3, 4, 5
MOST_INPUTS = 2 * (2**31 // 127**2)  # of 2:4, whose products of codes are summed in 32 bits
ARGUMENTS = (*[c_void_p] * 4, c_int64)  # of every kernel: layer, x, y, room, tokens

Function = Callable[..., None]
Run = Callable[[Tensor], Tensor]


class LayerOf24(ctypes.Structure):
    """What is the same for every call of a 2:4 layer, as kernels.cpp reads it."""

    _fields_ = (
        *((name, c_void_p) for name in ("parallel", "values", "metadata", "scales", "bias")),
        *((name, c_int64) for name in ("rows", "width", "group")),
        *((name, c_int32) for name in ("kind", "scale_kind", "type", "bias_type")),
    )


class LayerOfBlocks(ctypes.Structure):
    """What is the same for every call of a block-sparse layer, as kernels.cpp reads it."""

    _fields_ = (
        *((name, c_void_p) for name in ("parallel", "values", "starts", "columns", "bias")),
        *((name, c_int64) for name in ("out", "width", "rows", "cols")),
        *((name, c_int32) for name in ("kind", "type", "bias_type")),
    )


def why_not() -> str | None:
    """Why these kernels cannot run on this machine, or None; where they are missing, warn once.

    Raises: ValueError if SECATEUR_CPU_BODY names a body that does not exist, or cannot run here.
    """
    if body() is None:
        return f"{CHOICE} is none"
    problem = _loaded()[1]
    if problem is not None:
        _warn(problem)
    return problem


@cache
def _warn(problem: str) -> None:
    warnings.warn(
        f"packed layers are slower on this CPU than they could be: {problem}", stacklevel=3
    )


@cache
def bodies() -> tuple[str, ...]:
    """The bodies that this processor can run, the best first."""
    has = torch.cpu.get_capabilities()
    return tuple(name for name, needs in NEEDS.items() if all(has.get(need) for need in needs))


def body() -> str | None:
    """The body that runs, or None if the environment says none.

    Raises: ValueError if it names a body that does not exist, or cannot run here.
    """
    able, named = bodies(), os.environ.get(CHOICE)
    if named == "none":
        return None
    if named and named not in able:
        raise ValueError(
            f"{CHOICE} needs one of {', '.join(able)} or none on this processor, got {named!r}: "
            "unset it, and the fastest runs"
        )
    return named or able[0]


def two_of_four(
    shape: tuple[int, int],
    values: Shaped[Tensor, "out kept"],
    metadata: UInt8[Tensor, "out bytes"],
    kind: int,
    scales: Float[Tensor, "out groups"] | None,
    bias: Float[Tensor, " out"] | None,
    dtype: torch.dtype,
) -> Run:
    """`x @ W.T + bias` for x of `dtype`; `kind` says how `values` are read.

    What it returns knows the addresses of these tensors and holds none of them.

    Error: products are exact in float32 or rounded once, summed in float32 in an order of its own,
        and rounded to `dtype`.
    """
    layer = _layer_of_24(shape, values, metadata, kind, scales)
    layer.bias, layer.bias_type = _bias(bias)
    layer.type = FLOATS[dtype]
    room = 0 if dtype == torch.float32 else shape[1]
    return _runner("two_of_four", layer, shape[0], room)


def rounded_two_of_four(
    shape: tuple[int, int],
    values: Int8[Tensor, "out kept"],
    metadata: UInt8[Tensor, "out bytes"],
    scales: Float[Tensor, "out 1"],
    bias: Float[Tensor, " out"] | None,
    dtype: torch.dtype,
) -> Run:
    """The linear of `secateur.formats.dynamic` for int8 codes: inputs are rounded to such, too.

    What it returns knows the addresses of these tensors and holds none of them.

    Error: none: the definition's numbers, bit for bit, where sums stay below 2^31 (`MOST_INPUTS`).
    """
    layer = _layer_of_24(shape, values, metadata, INT8, scales)
    layer.bias, layer.bias_type = _bias(bias)
    layer.type = FLOATS[dtype]
    return _runner("rounded_two_of_four", layer, shape[0], shape[1] // 4 + 1)


def dense_two_of_four(
    shape: tuple[int, int],
    values: Shaped[Tensor, "out kept"],
    metadata: UInt8[Tensor, "out bytes"],
    kind: int,
    scales: Float[Tensor, "out groups"] | None = None,
) -> Float[Tensor, "out in"]:
    """The dense weight: of the dtype of 16-bit values, in float32 otherwise."""
    layer = _layer_of_24(shape, values, metadata, kind, scales)
    dtype = values.dtype if kind in (1, 2) else torch.float32
    weight = torch.empty(shape, dtype=dtype, device="cpu")
    _function("dense_two_of_four")(ctypes.byref(layer), None, weight.data_ptr(), None, 0)
    return weight


def blocks(
    shape: tuple[int, int],
    by_column: Float[Tensor, "blocks cols rows"],
    crow_indices: Int32[Tensor, " row_blocks_and_1"],
    col_indices: Int32[Tensor, " blocks"],
    bias: Float[Tensor, " out"] | None,
    dtype: torch.dtype,
) -> Run:
    """`x @ W.T + bias` for x of `dtype`; `by_column` holds each block transposed.

    What it returns knows the addresses of these tensors and holds none of them.

    Error: products are exact in float32 or rounded once, summed in float32 in the order of columns,
        and rounded to `dtype`.
    """
    held = by_column, crow_indices, col_indices
    layer = LayerOfBlocks(_parallel(), *map(_address, held))
    layer.bias, layer.bias_type = _bias(bias)
    layer.out, layer.width = shape
    _, layer.cols, layer.rows = by_column.shape
    layer.kind, layer.type = FLOATS[by_column.dtype], FLOATS[dtype]
    room = 0 if dtype == torch.float32 else sum(shape)
    return _runner("blocks", layer, shape[0], room)


def _layer_of_24(
    shape: tuple[int, int], values: Tensor, metadata: Tensor, kind: int, scales: Tensor | None
) -> LayerOf24:
    layer = LayerOf24(_parallel(), *map(_address, (values, metadata, scales)))
    layer.rows, layer.width = shape
    layer.group = shape[1] if scales is None or scales.shape[1] == 1 else 128
    layer.kind = kind
    layer.scale_kind = FLOATS[torch.float32 if scales is None else scales.dtype]
    return layer


def _runner(name: str, layer: ctypes.Structure, out: int, room: int) -> Run:
    """The kernel for this layer, with room for so many floats a token."""
    function, layer_at = _function(name), ctypes.byref(layer)

    def run(x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        if not x.is_contiguous():
            x = x.contiguous()
        lead = x.shape[:-1]
        tokens, y = lead.numel(), x.new_empty((*lead, out))
        if room:
            place = torch.empty(tokens * room, dtype=torch.float32, device="cpu")
            function(layer_at, x.data_ptr(), y.data_ptr(), place.data_ptr(), tokens)
        else:
            function(layer_at, x.data_ptr(), y.data_ptr(), None, tokens)
        return y

    return run


def _bias(bias: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if bias is None else (bias.data_ptr(), FLOATS[bias.dtype])


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _function(name: str) -> Function:
    return _function_of(name, body())


@cache
def _function_of(name: str, of: str | None) -> Function:
    library, problem = _loaded()
    assert library is not None and of is not None, problem
    function = getattr(library, f"{name}_{of}")
    function.restype, function.argtypes = None, ARGUMENTS
    made: Function = function
    return made


@cache
def _parallel() -> int:
    """The address of torch's loop over threads."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    address = ctypes.cast(library.torch_parallel_for, c_void_p).value
    assert address is not None
    return address


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    return load(FOLDER)


def load(folder: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """The library in a folder of sources, or None and why it is not to be had."""
    where = folder / LIBRARY
    again = "install secateur again where a C++ compiler is, or from a wheel for this platform"
    if not where.exists():
        return None, f"the kernels for a CPU were not compiled into this installation: {again}"
    try:
        library = ctypes.CDLL(str(where))
        sources = (ctypes.c_char * 16).in_dll(library, "secateur_sources").value.decode()
        _parallel()
    except (OSError, ValueError, AttributeError) as error:
        return None, f"the kernels for a CPU cannot be loaded ({error}): {again}"
    if sources != hash_of(folder):
        return None, f"the kernels for a CPU were compiled from other sources: {again}"
    return library, None


def hash_of(folder: Path) -> str:
    """What `hatch_build.py` compiles into the library: a hash of its sources."""
    texts = b"".join((folder / name).read_bytes() for name in SOURCES)
    return hashlib.sha256(texts).hexdigest()[:16]
