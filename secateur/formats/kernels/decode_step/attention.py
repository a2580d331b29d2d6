"""Attention of one new token of each sequence over cached keys and values, bound to its tensors."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.formats.kernels.decode_step.between import Bound, bound
from secateur.formats.kernels.gpu import why_no_bindings, why_no_gpu, why_not_capability
from secateur.formats.kernels.launch import Launch, load, prepare
from secateur.formats.kernels.nvrtc import Source

NAME = "the attention kernel"
SOURCE = Source("decode_step/attention.cu", "attention", ("ptx.cuh",))
ARGUMENTS = "PPPPPPPPPPiiiifff"
HEADS = (64, 128, 256)  # sizes of a head
NUMBERS = 512 * 32  # of a head, times the threads of a CTA
STAGES = 3
STAGE_BYTES = (
    32 * 1024
)  # a tile of keys and values of every warp: the same for every size of a head
CLUSTERS_FROM = (9, 0)
MOST_QUERIES = 8  # heads of a cluster: half of the rows that tensor cores multiply
SPLITS = (8, 4, 2)  # CTAs of a cluster
WITHOUT_WINDOW = 2**30


@dataclass(frozen=True)
class Attention:
    """What the kernel is compiled for, beside the dtype: the heads, and what is done to them.

    `window` is the most keys that a query sees, its own among them; `cap` that of the scores, where
    there is one; `normed` is whether queries and keys are normalised before the rotation.
    """

    query_heads: int
    kv_heads: int
    head: int
    scale: float
    window: int = WITHOUT_WINDOW
    cap: float = 0.0
    normed: bool = False

    @property
    def group(self) -> int:
        """The query heads of a kv head."""
        return self.query_heads // self.kv_heads


def why_no_attention(attention: Attention, device: torch.device) -> str | None:
    """Why the kernel cannot run here, or None."""
    if (problem := why_no_gpu(device)) is not None:
        return problem
    if attention.head not in HEADS:
        return f"{NAME} has heads of {', '.join(map(str, HEADS))} numbers, got {attention.head}"
    if attention.query_heads % attention.kv_heads:
        return (
            f"{NAME} needs whole groups, got {attention.query_heads} / {attention.kv_heads} heads"
        )
    remedy = "the model's own forward still works"
    return why_not_capability(NAME, device, CLUSTERS_FROM, remedy) or why_no_bindings(NAME)


def attention(
    what: Attention,
    qkv: Float[Tensor, "batch heads_times_head"],
    keys: Float[Tensor, "batch kv_heads slots head"],
    values: Float[Tensor, "batch kv_heads slots head"],
    rotation: tuple[Float[Tensor, "positions half"], Float[Tensor, "positions half"]],
    norms: tuple[Float[Tensor, " head"], Float[Tensor, " head"], float] | None,
    position: Int[Tensor, "1"],
    padding: Int[Tensor, " batch"],
    y: Float[Tensor, "batch query_heads_times_head"],
) -> Bound:
    """Y = softmax(q K^T scale) V, once the new key and value stand in the cache at `position`.

    The first `padding` slots of a sequence hold nothing, and its positions count from there.

    Error: queries, scores, weights and sums are float32; one rounding of the result.
    """
    batch, _, slots, _ = keys.shape
    launch = _launch(what, batch, qkv.dtype, qkv.device)
    query_norm, key_norm, epsilon = norms if norms is not None else (None, None, 0.0)
    return bound(
        launch,
        *(qkv, keys, values, *rotation, query_norm, key_norm, position, padding, y),
        *(what.query_heads, what.kv_heads, slots, what.window, what.scale, what.cap, epsilon),
    )


@lru_cache(maxsize=64)
def _launch(what: Attention, batch: int, dtype: torch.dtype, device: torch.device) -> Launch:
    count = torch.cuda.get_device_properties(device).multi_processor_count
    queries, cluster = shares(what, batch, count)
    clusters = batch * what.kv_heads * -(-what.group // queries)
    kernel = load(SOURCE, defines(what, queries, cluster, dtype), device)
    threads, ring = NUMBERS // what.head, STAGES * STAGE_BYTES
    return prepare(kernel, clusters * cluster, cluster, threads, ring, True, ARGUMENTS)


def shares(what: Attention, batch: int, multiprocessors: int) -> tuple[int, int]:
    """Query heads that a cluster serves, and CTAs that split its keys.

    All heads of a group, which read the same keys; fewer where multiprocessors would be left over,
    on which CTAs of the kernel behind would be placed two by two. As many CTAs as leave a
    multiprocessor to each, at most 8 a cluster: with two on one it takes longer
    (docs/log/2026-12-01-attention-by-tensor-cores.md).
    """
    queries = min(MOST_QUERIES, 1 << (what.group - 1).bit_length())
    groups = batch * what.kv_heads

    def clusters(queries: int) -> int:
        return groups * -(-what.group // queries)

    while queries > 1 and SPLITS[0] * clusters(queries // 2) <= multiprocessors:
        queries //= 2
    fitting = (n for n in SPLITS if clusters(queries) * n <= multiprocessors)
    return queries, next(fitting, 1)


def defines(
    what: Attention, queries: int, cluster: int, dtype: torch.dtype
) -> tuple[tuple[str, int], ...]:
    """The macros of `attention.cu`, whose head says what each means."""
    return (
        ("HALF", int(dtype == torch.float16)),
        ("HEAD", what.head),
        ("QUERIES", queries),
        ("CLUSTER", cluster),
        ("STAGES", STAGES),
        ("NORM", int(what.normed)),
        ("SOFTCAP", int(what.cap > 0)),
    )
