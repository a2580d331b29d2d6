"""The decode kernel, launched: one call from Python for each linear layer."""

import os
from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats.kernels.decode24.arrange import Kind, why_no_units
from secateur.formats.kernels.decode24.choose import choose
from secateur.formats.kernels.decode24.config import (
    CLUSTERS_FROM,
    MOST_TOKENS,
    PLAIN,
    SM_BYTES,
    SPARSE_FROM,
    Case,
    Fusion,
    LaunchConfig,
    bucket,
)
from secateur.formats.kernels.gpu import check_bias, on, why_no_bindings, why_not_capability
from secateur.formats.kernels.launch import Launch, address, load, prepare, readable
from secateur.formats.kernels.nvrtc import Source

NAME = "the decode kernel"  # in messages
HEADERS = ("ptx.cuh", "decode24/units.cuh", "decode24/of_eight.cuh")
SOURCE = Source("decode24/kernel.cu", "decode", HEADERS)
ALONE_BYTES = SM_BYTES // 2 + 2048  # of shared memory: no two CTAs of a kernel share an SM
ALONE_FROM = 20_000_000  # bytes of a weight
ARGUMENTS = "PPPPPiii"  # x, weight, row_scales, bias, y, M, N, K


def why_not(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, tokens: int
) -> str | None:
    """Why the kernel cannot run this layer here and what to do, or None."""
    if (problem := why_no_units(NAME, shape, dtype, device)) is not None:
        return problem
    if tokens > MOST_TOKENS:
        return f"the decode kernel serves at most {MOST_TOKENS} tokens, got {tokens}"
    remedy = "the reference and dense layers still work"
    return why_not_capability(NAME, device, SPARSE_FROM, remedy) or why_no_bindings(NAME)


def multiply(
    x: Float[Tensor, "tokens in"],
    units: UInt8[Tensor, "tiles units bytes"],
    row_scales: Float[Tensor, "out 1"] | None,
    bias: Float[Tensor, " out"] | None,
    kind: Kind,
    grouped: bool,
    rows: int,
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T * row_scales + bias` for the weight W of these units, summed in float32.

    Error: products are exact in float32; sums are float32 in a fixed order, so that a repeated call
        gives the same bits; one rounding of the result. bfloat16 activations of at least 2^63 in
        magnitude count as infinite where the weight is quantised.
    Raises: RuntimeError if the kernel has to be compiled while a graph is captured; ValueError if
        the bias has another dtype.
    """
    device = x.device
    check_bias(NAME, bias, x.dtype)
    x, bias = readable(x), None if bias is None else readable(bias)
    y = x.new_empty(len(x), rows)
    launch, told = _prepared(x, units, row_scales, bias, kind, grouped, y)
    with on(device):
        launch(torch.cuda.current_stream(device).cuda_stream, *told)
    return y


def multiply_into(
    x: Float[Tensor, "tokens in"],
    units: UInt8[Tensor, "tiles units bytes"],
    row_scales: Float[Tensor, "out 1"] | None,
    bias: Float[Tensor, " out"] | None,
    kind: Kind,
    grouped: bool,
    y: Float[Tensor, "tokens out"],
    fusion: Fusion = PLAIN,
    norm: tuple[Float[Tensor, " in"], float] | None = None,
) -> Callable[[int], None]:
    """`multiply` into y, bound to these tensors: called with a stream's handle, it launches there.

    The tensors are contiguous, keep their addresses, and live as long as what is returned. `norm`
    is the weight and the epsilon of a fusion that is `normed`; rows of x are [gate, up] of one with
    a gate.

    Raises: ValueError where `why_not_fused` has a reason.
    """
    check_bias(NAME, bias, x.dtype)
    launch, told = _prepared(x, units, row_scales, bias, kind, grouped, y, fusion)
    if norm is not None:
        told = *told, norm[0].data_ptr(), norm[1]

    def run(stream: int, _alive: object = (x, units, row_scales, bias, y, norm)) -> None:
        launch(stream, *told)

    return run


def _prepared(
    x: Tensor,
    units: Tensor,
    row_scales: Tensor | None,
    bias: Tensor | None,
    kind: Kind,
    grouped: bool,
    y: Tensor,
    fusion: Fusion = PLAIN,
) -> tuple[Launch, tuple[int | float, ...]]:
    """The launch, and its arguments."""
    (tokens, columns), rows = x.shape, y.shape[1]
    columns = columns // 2 if fusion.gate else columns
    launch = _launch(x.device, kind, grouped, x.dtype, rows, columns, bucket(tokens), fusion)
    pointers = x.data_ptr(), units.data_ptr(), address(row_scales), address(bias), y.data_ptr()
    return launch, (*pointers, tokens, rows, columns)


@lru_cache(maxsize=1024)  # five buckets of tokens for each of a model's few shapes
def _launch(
    device: torch.device,
    kind: Kind,
    grouped: bool,
    dtype: torch.dtype,
    rows: int,
    columns: int,
    tokens: int,
    fusion: Fusion,
) -> Launch:
    case = Case(kind, grouped, dtype, rows, columns, tokens)
    config = choose(case, device, in_step=fusion != PLAIN)
    return prepared(case, config, device, fusion=fusion)


def why_not_fused(
    kind: Kind,
    grouped: bool,
    dtype: torch.dtype,
    shape: tuple[int, int],
    tokens: int,
    fusion: Fusion,
    device: torch.device,
) -> str | None:
    """Why a launch for this layer cannot do more than multiply, or None."""
    if torch.cuda.get_device_capability(device) < CLUSTERS_FROM:
        return "fused launches need compute capability 9.0"
    case = Case(kind, grouped, dtype, *shape, bucket(tokens))
    return choose(case, device, in_step=True).why_not_fused(case, fusion)


def prepared(
    case: Case,
    config: LaunchConfig,
    device: torch.device,
    dependent: bool = True,
    fusion: Fusion = PLAIN,
) -> Launch:
    """A launch by this config.

    The grid is filled up to what the device holds with one CTA on each SM: with fewer, the CTAs of
    the kernel behind, which may start early, would share an SM two by two and take twice as long.
    CTAs in excess wait for the kernel before, stay until the next kernel's are placed, and end; if
    they ended sooner, the SMs that they left would get two. For the same reason a CTA takes more
    than a third of an SM's shared memory: two fit, one of this kernel and one of the next, never
    three. In a decode step a kernel of many bytes takes more than half: where the one before leaves
    whole SMs, two of its CTAs would be placed on the first of them, and none on others.

    Raises: RuntimeError if the device cannot hold it; ValueError if it cannot be fused so.
    """
    if (problem := config.why_not_fused(case, fusion)) is not None:
        raise ValueError(f"{NAME} cannot be fused so: {problem}")
    portable = torch.cuda.get_device_capability(device) < CLUSTERS_FROM
    kernel = load(SOURCE, config.defines(case, portable, fusion), device)
    large = fusion != PLAIN and case.nbytes >= ALONE_FROM
    shared_bytes = max(config.shared_bytes(case), ALONE_BYTES if large else SM_BYTES // 3)
    alone = max(shared_bytes, SM_BYTES // 2)
    clusters = config.clusters(case)
    if not portable:
        clusters = max(clusters, kernel.most_clusters(config.cluster, config.threads, alone))
    dependent = dependent and not portable and os.environ.get("SECATEUR_DEPENDENT", "1") != "0"
    grid = clusters * config.cluster
    arguments = ARGUMENTS + ("Pf" if fusion.normed else "")
    return prepare(kernel, grid, config.cluster, config.threads, shared_bytes, dependent, arguments)
