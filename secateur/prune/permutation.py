"""An order of a weight's columns in which an N:M pattern keeps more of the score.

A group of m neighbouring columns keeps n weights of every row, so a group of large columns loses
large weights while a group of small columns keeps small ones. The columns are dealt out to make the
groups alike, then exchanged between groups, one slot at a time, by linear assignment.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.core.float64 import in_float64
from secateur.patterns import NM

# Groups that exchange columns with one another; an assignment takes the cube of their number.
GROUPS_AT_ONCE = 256

# Share of the kept score: a round over the slots that gains less is the last.
LEAST_GAIN = 1e-4


@torch.no_grad()
def find_permutation(score: Float[Tensor, "out in"], pattern: NM) -> Int[Tensor, " in"]:
    """An order p of the columns for which the pattern keeps more of `score[:, p]`.

    Never worse than the original order, which is returned if no better one is found. Otherwise it
    is close to a local optimum: the last round of reassigning the columns of each slot, among 256
    groups at a time, gained less than a ten-thousandth.

    Cost: a few rounds, each of at most 256 * in * out operations and, on the CPU, in / 256
        assignments of 256 columns. Memory: three copies of the scores, in float32 at least.
    Raises:
        ValueError: if the width is not a multiple of m, a score is not finite, or scipy is missing.
    Source: heuristic allocation, then linear sum assignment: Zhang et al., Plug-and-Play, ICLR
        2024. The objective: Pool and Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021.
    """
    width = score.shape[1]
    if width % pattern.m:
        raise ValueError(
            f"find_permutation needs a width that is a multiple of {pattern.m} for {pattern}, got "
            f"{width}: choose another pattern"
        )
    if not score.isfinite().all():
        raise ValueError("find_permutation needs finite scores: repair the weights or the data")
    optimize = _scipy()
    identity = torch.arange(width, device=score.device)
    if pattern.n == pattern.m or width == pattern.m:
        return identity
    columns = score.to(torch.promote_types(score.dtype, torch.float32)).T.contiguous()
    groups = _dealt(columns, pattern.m)
    blocks = -(-len(groups) // GROUPS_AT_ONCE)
    for i in range(blocks):  # interleaved, since neighbouring groups hold similar columns
        groups[i::blocks] = _refined(optimize, columns, groups[i::blocks], pattern.n)
    better = _kept(columns, groups, pattern.n) > _kept(columns, identity.view_as(groups), pattern.n)
    return groups.flatten() if better else identity


def kept_score(score: Float[Tensor, "out in"], pattern: NM) -> float:
    """The sum of the scores that the pattern keeps, summed in float64."""
    return float(in_float64(score.masked_fill(~pattern.mask(score), 0)).sum())


def _dealt(columns: Float[Tensor, "in out"], m: int) -> Int[Tensor, "groups {m}"]:
    """The groups, with columns dealt to them in order of their sums, back and forth."""
    dealt = columns.sum(1).argsort(descending=True, stable=True).view(m, -1)
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.contiguous()


def _refined(
    optimize: Any, columns: Float[Tensor, "in out"], groups: Int[Tensor, "groups m"], n: int
) -> Int[Tensor, "groups m"]:
    """The groups after rounds over the slots; the last is the first to gain next to nothing."""
    kept = _kept(columns, groups, n)
    while True:
        before = kept
        for slot in range(groups.shape[1]):
            groups = _reassigned(optimize, columns, groups, n, slot)
        kept = _kept(columns, groups, n)
        if kept - before <= LEAST_GAIN * abs(before):
            return groups


def _reassigned(
    optimize: Any,
    columns: Float[Tensor, "in out"],
    groups: Int[Tensor, "groups m"],
    n: int,
    slot: int,
) -> Int[Tensor, "groups m"]:
    """The groups after the columns of this slot went to the groups where they add the most.

    With t the n-th largest of the others in a row, a column c adds max(0, c - t) there, which is
    (c - t + |c - t|) / 2. Each c and each t is used once, so only the distances |c - t| matter.
    None moves for nothing: a round that gains nothing has tried every slot of the same groups.
    """
    others = torch.cat([groups[:, :slot], groups[:, slot + 1 :]], 1)
    threshold = columns[others].topk(n, dim=1).values[:, -1]
    distance = torch.cdist(threshold, columns[groups[:, slot]], p=1).cpu().numpy()
    own, taken = optimize.linear_sum_assignment(distance, maximize=True)
    if distance[own, taken].sum() <= distance.trace():
        return groups
    trial = groups.clone()
    trial[:, slot] = groups[torch.from_numpy(taken).to(groups.device), slot]
    return trial


def _kept(columns: Float[Tensor, "in out"], groups: Int[Tensor, "groups m"], n: int) -> float:
    return float(in_float64(columns[groups].topk(n, dim=1).values).sum())


def _scipy() -> Any:
    """The module `scipy.optimize`, imported here because scipy is an extra and takes 0.2 s."""
    try:
        from scipy import optimize
    except ImportError:
        raise ValueError(
            "permute_ needs scipy, which is not installed: pip install 'secateur[budget]'"
        ) from None
    return optimize
