"""Keeping exactly k of n, the one selection every pattern is built on."""

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

# Up to this width, ranking by pairwise comparison beats a sort: n (n-1) / 2 vector comparisons over
# all groups at once. On two CPU threads 4096 x 4096 at 2:4 takes 0.1 s against 0.4 s by sorting.
PAIRWISE_WIDTH = 16


def keep_top(score: Shaped[Tensor, "*rows n"], k: int) -> Bool[Tensor, "*rows n"]:
    """The mask of exactly the `k` largest scores in each row; the lower index wins among equals.

    Exact and deterministic on every device, which `torch.topk` is not for equal scores.
    """
    n = score.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(f"keep_top needs 0 <= k <= {n}, got {k}")
    if k in (0, n):
        return torch.full_like(score, k == n, dtype=torch.bool)
    return _by_rank(score, k) if n <= PAIRWISE_WIDTH else _by_threshold(score, k)


def _by_rank(score: Tensor, k: int) -> Tensor:
    """Keep the scores that fewer than k others beat; i beats a later j if at least as large."""
    columns = score.movedim(-1, 0).contiguous()
    beaten_by = torch.empty(columns.shape, dtype=torch.uint8, device=score.device)
    for i in range(len(columns)):
        beaten_by[i] = len(columns) - 1 - i  # by every later one, until i turns out to beat it
    for i in range(len(columns)):
        for j in range(i + 1, len(columns)):
            i_beats_j = (columns[i] >= columns[j]).view(torch.uint8)
            beaten_by[j] += i_beats_j
            beaten_by[i] -= i_beats_j
    return (beaten_by < k).movedim(0, -1).contiguous()


def _by_threshold(score: Tensor, k: int) -> Tensor:
    """Keep what is above the k-th largest score, then as many of its equals as the count allows."""
    n = score.shape[-1]
    threshold = score.kthvalue(n - k + 1, dim=-1, keepdim=True).values
    above, equal = score > threshold, score == threshold
    missing = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= missing))


def count_zeros(sparsity: float, n: int) -> int:
    """The zeros that a sparsity asks of n weights: `sparsity * n`, rounded half up. Stated once."""
    return int(sparsity * n + 0.5)
