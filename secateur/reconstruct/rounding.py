"""Rounding to a grid with the zeros where they are: the end of a refit and of a trained half-block.

Symbols: `W` the weight with its zeros, `Q` the weight on the grid, `H` the damped Hessian of the
layer's output error, `P = H (W - Q)`; all of them transposed, so that a column is contiguous.

SparseGPT's walk chooses the scales and a first Q. Each rounding is made up for in all columns to
come, in pruned ones too, where it is lost again. So coordinate descent follows, which knows the
zeros: in turn a group's scale, then each of its codes, takes the value that loses least while all
others stay, over a few rounds.
Source: for codes, Behdin et al. (QuantEase), arXiv:2309.01885; the start is GPTQ's, Frantar et al.,
arXiv:2210.17323.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.graphs import ONE_AT_A_TIME, captured
from secateur.patterns.grids import Grid
from secateur.reconstruct.sparsegpt import FEWEST, walked

# Rounds of descent, and the share of the error that the last one has to take off for another.
ROUNDS, WORTH = 8, 0.003

# Columns after which all others are brought up to date, by one product.
AT_ONCE = 128


class Rounded(NamedTuple):
    """A weight on a grid, and what training goes on from."""

    weight: Float[Tensor, "out in"]
    scales: Float[Tensor, "out groups"]
    latent: Float[Tensor, "out in"]  # what would lose least in place of each code, and rounds to it


def rounded(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    grid: Grid,
    *,
    damping: float = 0.01,
    dtype: torch.dtype | None = None,
) -> Rounded:
    """The weight on the grid, with these zeros, whose outputs are nearest to the weight's own.

    Nearest among what SparseGPT's walk and descent from there find: tr (W - Q) H (W - Q)^T is never
    above the walk's. Scales, and scale x code, are rounded to `dtype`, in which the layer will
    store it (by default the weight's own), so that packing finds the grid again and loses nothing.

    Cost: O(in^3 + out in^2) time, of which a round of descent takes 2 out in^2, 8 rounds at most;
        2 in^2 + 7 out in float32 numbers of memory.
    Raises:
        ValueError: if H has no Cholesky factor even with the damping raised a million times.
    """
    dtype = dtype or weight.dtype
    Q, scales = walked(weight, mask, gram, grid, damping=damping, dtype=dtype)
    H = gram.float().clone()
    H.diagonal().add_(damping * H.diagonal().mean())
    descent = _Descent(
        weight.float().masked_fill(~mask, 0).T, Q.T, scales.T, mask.T, H, grid, dtype
    )
    error = descent.error()
    for _ in range(ROUNDS):
        descent.round()
        before, error = error, descent.error()
        if not error < (1 - WORTH) * before:
            break
    latent = descent.latent().T.contiguous()
    return Rounded(descent.Q.T.to(weight.dtype), descent.scales.T.to(dtype), latent)


class _Descent:
    """Q and its scales, on the way down."""

    def __init__(
        self,
        W: Float[Tensor, "in out"],
        Q: Float[Tensor, "in out"],
        scales: Float[Tensor, "groups out"],
        mask: Bool[Tensor, "in out"],
        H: Float[Tensor, "in in"],
        grid: Grid,
        dtype: torch.dtype,
    ) -> None:
        self.W, self.Q, self.H = W.contiguous(), Q.contiguous(), H
        self.scales = scales.float().contiguous()
        self.mask, self.grid, self.dtype = mask.contiguous(), grid, dtype
        self.P = H @ (self.W - self.Q)
        self.d = H.diagonal().masked_fill(H.diagonal() <= 0, 1)
        self.in_graphs = H.is_cuda and len(H) >= FEWEST

    def error(self) -> float:
        """The error of the outputs, tr (W - Q) H (W - Q)^T."""
        return float(((self.W - self.Q) * self.P).sum())

    def latent(self) -> Float[Tensor, "in out"]:
        """For each kept weight what would lose least in its place, if it is nearest to its code."""
        best = self.Q + self.P / self.d[:, None]
        for group, columns in self.groups():
            scale, Q = self.scales[group], self.Q[columns]
            same = self.grid.nearest(best[columns] / scale) == self.grid.nearest(Q / scale)
            best[columns] = torch.where(same & self.mask[columns], best[columns], Q)
        return best

    def round(self) -> None:
        """Every scale and every code once."""
        for group, columns in self.groups():
            self.rescale(group, columns)
            for start in range(columns.start, columns.stop, AT_ONCE):
                self.recode(group, slice(start, min(start + AT_ONCE, columns.stop)))

    def groups(self) -> Iterator[tuple[int, slice]]:
        width = self.grid.group_size or len(self.W)
        for group, start in enumerate(range(0, len(self.W), width)):
            yield group, slice(start, min(start + width, len(self.W)))

    def rescale(self, group: int, columns: slice) -> None:
        """Give each output the scale that loses least with these codes, where that is a gain."""
        Q, P, H, scale = (
            self.Q[columns],
            self.P[columns],
            self.H[columns, columns],
            self.scales[group],
        )
        codes = self.grid.nearest(Q / scale)
        bend = ((H @ codes) * codes).sum(0)
        tried = scale + (P * codes).sum(0) / bend.masked_fill(bend <= 0, 1)
        tried = tried.to(self.dtype).float()
        new = _stored(codes, tried, self.dtype)
        moved = new - Q
        gained = (moved * (2 * P - H @ moved)).sum(0)
        better = (gained > 0) & (tried > 0) & new.isfinite().all(0)
        self.scales[group] = torch.where(better, tried, scale)
        self.move(columns, torch.where(better, new, Q))

    def recode(self, group: int, columns: slice) -> None:
        """Give each column the codes that lose least, one after another."""
        given = [
            self.Q[columns].clone(),
            self.P[columns].clone(),
            ~self.mask[columns],
            self.H[columns, columns],
            self.scales[group],
            self.d[columns],
        ]
        if self.in_graphs:
            self.move(columns, self.replayed(given))
        else:
            _recode_(self.grid, self.dtype, *given)
            self.move(columns, given[0])

    def replayed(self, given: list[Tensor]) -> Tensor:
        """The new Q of these columns, by a CUDA graph on memory of its own."""
        stream = torch.cuda.current_stream(self.H.device)
        with ONE_AT_A_TIME:
            own, replay = _graph(*given[0].shape, self.grid, self.dtype, stream)
            for tensor, value in zip(own, given, strict=True):
                tensor.copy_(value)
            replay()
            return own[0].clone()

    def move(self, columns: slice, to: Float[Tensor, "some out"]) -> None:
        """Give the columns these weights, to the bit."""
        self.P.addmm_(self.H[:, columns], to - self.Q[columns], alpha=-1)
        self.Q[columns] = to


def _recode_(
    grid: Grid,
    dtype: torch.dtype,
    Q: Float[Tensor, "some out"],
    P: Float[Tensor, "some out"],
    dropped: Bool[Tensor, "some out"],
    H: Float[Tensor, "some some"],
    scale: Float[Tensor, " out"],
    d: Float[Tensor, " some"],
) -> None:
    """Choose the codes of each column anew, one after another, in Q; P follows."""
    for j in range(len(Q)):
        codes = grid.nearest((Q[j] + P[j] / d[j]) / scale)
        new = _stored(codes, scale, dtype).masked_fill_(dropped[j], 0)
        P.addr_(H[j], new - Q[j], alpha=-1)
        Q[j] = new


@lru_cache(maxsize=8)  # as for the walk
def _graph(
    columns: int, outputs: int, grid: Grid, dtype: torch.dtype, stream: torch.cuda.Stream
) -> tuple[list[Tensor], Callable[[], None]]:
    """Memory for what `_recode_` is given for so many columns, and the graph that works on it."""
    with torch.inference_mode(False):  # or the memory could not be written to outside of it
        of_columns = torch.ones(columns, outputs, dtype=torch.float32, device=stream.device)
        H = torch.eye(columns, dtype=torch.float32, device=stream.device)
        dropped = torch.zeros_like(of_columns, dtype=torch.bool)
        own = [of_columns, of_columns.clone(), dropped, H, of_columns[0].clone(), H[0].clone()]
        own[-1].fill_(1)
        return own, captured(partial(_recode_, grid, dtype, *own), stream)


def _stored(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale x code as the layer will store it."""
    return (codes * scale).to(dtype).float()
