"""Queries and keys of a prompt turned by their positions, keys and values appended to the cache."""

from functools import lru_cache
from math import ceil

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats.kernels.decode_step.attention import Attention
from secateur.formats.kernels.decode_step.between import Bound, bound
from secateur.formats.kernels.launch import Launch, load, prepare
from secateur.formats.kernels.nvrtc import Source

SOURCE = Source("decode_step/append.cu", "append", ("ptx.cuh",))
ARGUMENTS = "PPPPPPPPPiiiiiiiif"
THREADS, NUMBERS = 256, 16  # of a CTA, and of a head in a thread


def append(
    what: Attention,
    q: Float[Tensor, "rows query_heads_times_head"],
    k: Float[Tensor, "rows kv_heads_times_head"],
    v: Float[Tensor, "rows kv_heads_times_head"],
    keys: Float[Tensor, "batch kv_heads slots head"],
    values: Float[Tensor, "batch kv_heads slots head"],
    rotation: tuple[Float[Tensor, "positions half"], Float[Tensor, "positions half"]],
    norms: tuple[Float[Tensor, " head"], Float[Tensor, " head"], float] | None,
) -> Bound:
    """Q turned in place; the first slots of the cache = k turned, and v.

    The rows are the sequences' tokens, one sequence after another, from position 0 on. Rows may
    stand apart; a token's heads follow one another.

    Error: float32 inside, each number is rounded once.
    """
    batch, _, slots, _ = keys.shape
    launch = _launch(what, len(q), q.dtype, q.device)
    query_norm, key_norm, epsilon = norms if norms is not None else (None, None, 0.0)
    return bound(
        launch,
        *(q, k, v, keys, values, *rotation, query_norm, key_norm),
        *(q.stride(0), k.stride(0), v.stride(0), len(q), len(q) // batch),
        *(what.query_heads, what.kv_heads, slots, epsilon),
    )


@lru_cache(maxsize=256)  # prompts have many lengths
def _launch(what: Attention, rows: int, dtype: torch.dtype, device: torch.device) -> Launch:
    kernel = load(SOURCE, defines(what, dtype), device)
    heads = what.query_heads + 2 * what.kv_heads
    blocks = ceil(rows * heads * what.head / NUMBERS / THREADS)
    return prepare(kernel, blocks, 1, THREADS, 0, True, ARGUMENTS)


def defines(what: Attention, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    """The macros of `append.cu`, whose head says what each means."""
    half = int(dtype == torch.float16)
    return (("HALF", half), ("HEAD", what.head), ("NORM", int(what.normed)))
