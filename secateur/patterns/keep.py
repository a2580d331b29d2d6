"""The mask of exactly k of n scores, which every pattern is built on."""

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

# Up to this width, ranking by pairwise comparison beats a sort: n (n-1) / 2 vector comparisons over
# all groups at once. On two CPU threads 4096 x 4096 at 2:4 takes 0.1 s against 0.4 s by sorting.
PAIRWISE_WIDTH = 16

# Up to this many scores a GPU finishes before the next kernel is launched, so that the number of
# launches matters; with more, comparing all pairs at once takes memory: 3 n bytes per score.
AT_ONCE = 2**18


def keep_top(score: Shaped[Tensor, "*rows n"], k: int) -> Bool[Tensor, "*rows n"]:
    """The mask of exactly the `k` largest scores in each row; ties go to the lower index.

    Exact and deterministic on every device, which `torch.topk` is not for equal scores.
    """
    n = score.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(f"keep_top needs 0 <= k <= {n}, got {k}")
    if k in (0, n):
        return torch.full_like(score, k == n, dtype=torch.bool)
    return _by_rank(score, k) if n <= PAIRWISE_WIDTH else _by_threshold(score, k)


def _by_rank(score: Tensor, k: int) -> Tensor:
    """The scores that fewer than k others beat; i beats a later j if it is at least as large.

    A score is beaten by its losses to earlier scores plus the later scores that it does not beat.
    """
    n = score.shape[-1]
    few = score.is_cuda and score.numel() <= AT_ONCE
    losses = _losses_at_once(score) if few else _losses_in_turns(score)
    later = torch.arange(n - 1, -1, -1, dtype=torch.int8, device=score.device)
    return (losses < k - later).contiguous()


def _losses_in_turns(score: Tensor) -> Tensor:
    """How many earlier scores beat each score, minus how many later scores it beats."""
    columns = score.movedim(-1, 0).contiguous()
    losses = torch.zeros(columns.shape, dtype=torch.int8, device=score.device)
    for i in range(len(columns) - 1):
        beats = (columns[i] >= columns[i + 1 :]).view(torch.int8)
        losses[i + 1 :] += beats
        losses[i] -= beats.sum(0, dtype=torch.int8)
    return losses.movedim(0, -1)


def _losses_at_once(score: Tensor) -> Tensor:
    """The same as `_losses_in_turns` in four launches: all pairs are compared at once."""
    beats = (score[..., :, None] >= score[..., None, :]).triu().view(torch.int8)
    return (beats - beats.mT).sum(-2, dtype=torch.int8)


def _by_threshold(score: Tensor, k: int) -> Tensor:
    """The scores above the k-th largest, and as many of its equals as the count leaves room for."""
    n = score.shape[-1]
    threshold = score.kthvalue(n - k + 1, dim=-1, keepdim=True).values
    above, equal = score > threshold, score == threshold
    missing = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= missing))


def count_zeros(sparsity: float, n: int) -> int:
    """The number of zeros in n weights at this sparsity: `sparsity * n`, rounded half up."""
    return int(sparsity * n + 0.5)
