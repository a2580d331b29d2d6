"""The embedding, RMS norms, gated activations and the choice of a token, bound to their tensors."""

from collections.abc import Callable
from functools import lru_cache
from math import ceil

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.formats.kernels.launch import Launch, address, load, prepare
from secateur.formats.kernels.nvrtc import Source

Bound = Callable[[int], None]  # launches on the stream of this handle

FILE, HEADERS = "decode_step/between.cu", ("ptx.cuh",)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")  # by the number that GATE has
THREADS, GATED_THREADS = 512, 128
PIECE = 8  # numbers that a thread reads at once
MOST_WIDTH = 4 * PIECE * THREADS  # of the residual stream
CHOOSERS = 32  # CTAs that look at the logits of one sequence


def embed(
    embedding: Float[Tensor, "vocabulary width"],
    tokens: Int[Tensor, " batch"],
    weight: Float[Tensor, " width"],
    epsilon: float,
    stream: Float[Tensor, "batch width"],
    y: Float[Tensor, "batch width"],
) -> Bound:
    """Stream = embedding[tokens]; y = stream / rms(stream) * weight.

    The first of a step: it begins only when all that was launched before has ended.
    """
    launch = _launch(
        "add_norm", stream.dtype, 0, len(stream), THREADS, "PPPPPif", stream.device, dependent=False
    )
    return bound(launch, stream, embedding, tokens, weight, y, stream.shape[1], epsilon)


def add_norm(
    stream: Float[Tensor, "batch width"],
    added: Float[Tensor, "batch width"],
    weight: Float[Tensor, " width"],
    epsilon: float,
    y: Float[Tensor, "batch width"],
) -> Bound:
    """Stream += added, rounded to 16 bits; y = stream / rms(stream) * weight, rounded once."""
    launch = _launch("add_norm", stream.dtype, 0, len(stream), THREADS, "PPPPPif", stream.device)
    return bound(launch, stream, added, None, weight, y, stream.shape[1], epsilon)


def norm(
    stream: Float[Tensor, "batch width"],
    weight: Float[Tensor, " width"],
    epsilon: float,
    y: Float[Tensor, "batch width"],
) -> Bound:
    """Y = stream / rms(stream) * weight, rounded once."""
    launch = _launch("add_norm", stream.dtype, 0, len(stream), THREADS, "PPPPPif", stream.device)
    return bound(launch, stream, None, None, weight, y, stream.shape[1], epsilon)


def gated(
    gate: Float[Tensor, "batch width"],
    up: Float[Tensor, "batch width"],
    activation: str,
    y: Float[Tensor, "batch width"],
) -> Bound:
    """Y = activation(gate) up, rounded once; rows of gate and up stand equally far apart."""
    rows, width = y.shape
    assert gate.stride() == up.stride(), "both are parts of one tensor, or tensors of their own"
    blocks = ceil(rows * width / PIECE / GATED_THREADS)
    number = ACTIVATIONS.index(activation)
    launch = _launch("gated", y.dtype, number, blocks, GATED_THREADS, "PPPiii", y.device)
    return bound(launch, gate, up, y, gate.stride(0), width, rows)


def choose(
    logits: Float[Tensor, "batch vocabulary"],
    tokens: Int[Tensor, " batch"],
    history: Int[Tensor, "slots batch"],
    position: Int[Tensor, "1"],
) -> Bound:
    """tokens, history[position] = the most likely of each sequence; ties go to the first.

    Then the position moves on by one.
    """
    rows, vocabulary = logits.shape
    best = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    done = torch.zeros(1, dtype=torch.int32, device=logits.device)
    blocks = rows * min(CHOOSERS, ceil(vocabulary / PIECE / THREADS))
    launch = _launch("choose", logits.dtype, 0, blocks, THREADS, "PPPPPPii", logits.device)
    return bound(launch, logits, best, done, tokens, history, position, vocabulary, rows)


def bound(launch: Launch, *values: Tensor | int | float | None) -> Bound:
    """The launch with these arguments; the tensors live as long as it."""
    told = tuple(
        address(value) if value is None or isinstance(value, Tensor) else value for value in values
    )

    def run(stream: int, launch: Launch = launch, _alive: object = values) -> None:
        launch(stream, *told)

    return run


@lru_cache(maxsize=256)
def _launch(
    entry: str,
    dtype: torch.dtype,
    activation: int,
    blocks: int,
    threads: int,
    arguments: str,
    device: torch.device,
    dependent: bool = True,
) -> Launch:
    defines = (("HALF", int(dtype == torch.float16)), ("GATE", activation))
    kernel = load(Source(FILE, entry, HEADERS), defines, device)
    return prepare(kernel, blocks, 1, threads, 0, dependent, arguments)
