"""SparseGPT: prune column by column, and let the columns still to come make up for each loss.

Symbols as in the paper: `W` the weight, `H` the damped Hessian of the layer's output error, `U` the
upper Cholesky factor of its inverse, `M` the mask, `E` the columns' errors.

The paper updates later columns lazily, 128 at a time. Here the columns are halved recursively: the
left half is eliminated, one product brings the right half up to date, then the right half follows.
That is the same arithmetic in another order, without a batch size, and nearly all of it is matrix
products. `W` is held transposed, so that a column is contiguous. What remains is a few launches per
column, which on a GPU take longer than the work they start: there CUDA graphs walk over the chunks
of columns at the bottom of the recursion.
Source: Frantar and Alistarh, arXiv:2301.00774, algorithm 1 and sections 3.2-3.3; with a grid,
section 3.5, whose scales for groups of columns are GPTQ's (Frantar et al., arXiv:2210.17323).
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.graphs import ONE_AT_A_TIME, captured
from secateur.model.statistics import call
from secateur.patterns import Pattern
from secateur.patterns.grids import Grid, require_grid
from secateur.patterns.keep import PAIRWISE_WIDTH
from secateur.reconstruct.solution import Solution

# Each failed factorisation multiplies the damping by ten: 1e-2 to 1e+4 of the mean diagonal.
DAMPING_STEPS = 7

# Columns that a CUDA graph walks over, at most and at least: its operands are copied in and out,
# which costs as much as walking over a few columns.
CHUNK, LEAST = 128, 32

# Columns from which a weight is walked over in graphs: capturing one costs as much as some chunks.
FEWEST = 4 * CHUNK

# Columns start..stop, and the pattern by which their zeros are chosen together; None if the zeros
# are there already.
Part = tuple[int, int, Pattern | None]


def sparsegpt(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    pattern: Pattern,
    *,
    damping: float = 0.01,
    grid: Grid | None = None,
    dtype: torch.dtype | None = None,
    memo: Callable[..., Any] = call,
) -> Solution:
    """The weight with the pattern's zeros and kept weights moved so that its outputs change least.

    The mask of each part of the columns is chosen when the walk gets there, from the weights as
    updated so far: the score is w^2 / U_jj^2, the cost of dropping a weight. Inputs that were never
    active (zero diagonal) carry no information: their weights become zero at no cost.

    With a `grid`, kept weights are also rounded to it, each when the walk gets to it, and later
    columns make up for that too. The scales of a group are chosen when the walk gets to its first
    column (for a whole row, at the start): the scales that cost least, (w - q)^2 / U_jj^2, for what
    the group would keep if it were pruned and not rounded. The result is an ordinary weight: scale
    x code, scale and product rounded to `dtype`, in which the layer will store it (by default the
    weight's own), so that packing finds the grid again and loses nothing.

    Cost: O(in^3 + out in^2) time, the O(in^3) once for layers with the same input, which share the
        factor (`memo`); 3 in^2 + 3 out in float32 memory; with a grid out in more, and with one
        scale per row the walk twice. On a GPU the walk's launches are captured for each shape of a
        layer; the last eight captures are kept, with 1152 bytes per output each.
    Raises:
        ValueError: if H has no Cholesky factor even with the damping raised a million times.
    """
    require_grid(grid, "sparsegpt")
    dead = gram.diagonal() == 0
    U, note = memo(_upper_factor, gram, damping)
    W = weight.float().T.contiguous()
    W[dead] = 0
    sweep = _Sweep(W, U, grid, dtype or weight.dtype, _can_capture(W))
    parts: list[Part] = list(pattern.parts((weight.shape[0], weight.shape[1])))
    sweep.run(_runs(parts, grid))
    if dead.any():
        note = "; ".join(filter(None, [note, f"{int(dead.sum())} inputs were never active"]))
    M = sweep.M.T.contiguous()
    return Solution(W.T.masked_fill(~M, 0).to(weight.dtype), M, note)


def walked(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    grid: Grid,
    *,
    damping: float,
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out groups"]]:
    """The weight on the grid, in float32, and its scales, by the same walk with the zeros given.

    Raises:
        ValueError: as `sparsegpt`.
    """
    U, _ = _upper_factor(gram, damping)
    W = weight.float().T.contiguous()
    sweep = _Sweep(W, U, grid, dtype, _can_capture(W))
    sweep.M = mask.T.contiguous()
    width = grid.group_size or len(W)
    sweep.run([[(a, min(a + width, len(W)), None)] for a in range(0, len(W), width)])
    return W.T.masked_fill(~mask, 0), torch.cat(sweep.chosen, 1)


class _Sweep:
    """The walk over the columns; W, E and M are transposed, so that a column is contiguous.

    `scales` belong to the current run of columns, which starts at `first`; without them nothing is
    rounded. With `in_graphs`, CUDA graphs walk over the chunks, unless several scales of an output
    belong to them.
    """

    def __init__(
        self,
        W: Float[Tensor, "in out"],
        U: Float[Tensor, "in in"],
        grid: Grid | None,
        dtype: torch.dtype,
        in_graphs: bool,
    ) -> None:
        self.W, self.U, self.grid, self.dtype, self.in_graphs = W, U, grid, dtype, in_graphs
        self.E = torch.zeros_like(W)
        self.M = torch.ones_like(W, dtype=torch.bool)
        self.d = U.diagonal()
        self.first = 0
        self.scales: Float[Tensor, "out groups"] | None = None
        self.chosen: list[Float[Tensor, "out groups"]] = []

    def run(self, runs: list[list[Part]]) -> None:
        """Prune these runs of parts one after another, each with its own scales."""
        if len(runs) > 1:
            middle = len(runs) // 2
            self.run(runs[:middle])
            self.make_up(runs[0][0][0], runs[middle][0][0], runs[-1][-1][1])
            self.run(runs[middle:])
            return
        (parts,) = runs
        if self.grid is not None:
            self.choose_scales(parts, self.grid)
        self.prune(parts)

    def choose_scales(self, parts: list[Part], grid: Grid) -> None:
        """Choose the scales that suit what these columns keep when pruned without a grid.

        The columns are pruned on trial and put back: weights grow as they make up for others, and
        scales chosen for the weights as they stand would clip them. With dependent inputs that was
        measured to lose up to 12 % more of the output.
        """
        self.first, stop = parts[0][0], parts[-1][1]
        columns = slice(self.first, stop)
        before = self.W[columns].clone()
        self.scales = None
        self.prune(parts)
        kept = self.W[columns].masked_fill(~self.M[columns], 0)
        self.W[columns] = before
        curvature = self.d[columns].square().reciprocal()
        self.scales = grid.scales(kept.T.to(self.dtype), curvature)
        self.chosen.append(self.scales)

    def prune(self, parts: list[Part]) -> None:
        """Choose the masks of these parts one after another, and eliminate what they drop."""
        first, last = parts[0][0], parts[-1][1]
        if self.is_chunk(first, last) and all(map(_is_launches_alone, parts)):
            self.replay(first, last, tuple((a - first, b - first, own) for a, b, own in parts))
            return
        if len(parts) > 1:
            middle = len(parts) // 2
            self.prune(parts[:middle])
            self.make_up(first, parts[middle][0], last)
            self.prune(parts[middle:])
            return
        ((start, stop, pattern),) = parts
        if pattern is not None:
            score = (self.W[start:stop] / self.d[start:stop, None]).square().T
            self.M[start:stop] = pattern.mask(score).T
        self.eliminate(start, stop)

    def eliminate(self, start: int, stop: int) -> None:
        """Compute the columns' errors: what dropping or rounding takes from each weight, over d."""
        if self.is_chunk(start, stop):
            self.replay(start, stop, ())
            return
        if stop - start > 1:
            middle = (start + stop) // 2
            self.eliminate(start, middle)
            self.make_up(start, middle, stop)
            self.eliminate(middle, stop)
            return
        weight, kept, error = self.W[start], self.M[start], self.E[start]
        torch.div(weight, self.d[start], out=error)
        if self.grid is None or self.scales is None:
            error.masked_fill_(kept, 0)
            return
        rounded = self.rounded(start, self.grid, self.scales)
        torch.where(kept, (weight - rounded) / self.d[start], error, out=error)
        self.W[start] = rounded

    def rounded(
        self, column: int, grid: Grid, scales: Float[Tensor, "out groups"]
    ) -> Float[Tensor, " out"]:
        """The column's weights on the grid, rounded to the dtype in which they will be stored."""
        group = 0 if grid.group_size is None else (column - self.first) // grid.group_size
        scale = scales[:, group].float()
        codes = grid.nearest(self.W[column] / scale).add_(0.0)  # of the two zeros +0
        return (codes * scale).to(self.dtype).float()

    def make_up(self, start: int, middle: int, stop: int) -> None:
        """Update the columns from `middle` to `stop` for the errors of the columns before them."""
        self.W[middle:stop].addmm_(
            self.U[start:middle, middle:stop].T, self.E[start:middle], alpha=-1
        )

    def is_chunk(self, start: int, stop: int) -> bool:
        """Whether a CUDA graph walks over these columns."""
        one_scale = self.scales is None or self.scales.shape[1] == 1
        return self.in_graphs and one_scale and LEAST <= stop - start <= CHUNK

    def replay(self, start: int, stop: int, parts: tuple[Part, ...]) -> None:
        """Prune these parts, counted from `start`, in a graph; without parts, only eliminate."""
        columns = slice(start, stop)
        stream = torch.cuda.current_stream(self.W.device)
        precision = torch.backends.cuda.matmul.fp32_precision
        with ONE_AT_A_TIME:
            grid = None if self.scales is None else (self.grid, self.dtype)
            own, walk_over = _chunk(stop - start, self.W.shape[1], parts, grid, stream, precision)
            if own.scales is not None and self.scales is not None:
                own.scales.copy_(self.scales)
            own.W.copy_(self.W[columns])
            own.U.copy_(self.U[columns, columns])
            own.M.copy_(self.M[columns])
            walk_over()
            self.W[columns], self.E[columns], self.M[columns] = own.W, own.E, own.M


@lru_cache(maxsize=8)  # a block of a language model has about four
def _chunk(
    columns: int,
    outputs: int,
    parts: tuple[Part, ...],
    rounding: tuple[Grid | None, torch.dtype] | None,
    stream: torch.cuda.Stream,
    precision: str,
) -> tuple[_Sweep, Callable[[], None]]:
    """A sweep over buffers of its own, and the graph that prunes the parts or eliminates there.

    A graph works on the memory it was captured with: operands are copied there, and the result
    back, in the order of one stream. It multiplies in the precision set when it was captured.
    """
    with torch.inference_mode(False):  # or the buffers could not be written to outside of it
        W = torch.zeros(columns, outputs, dtype=torch.float32, device=stream.device)
        U = torch.eye(columns, dtype=torch.float32, device=stream.device).T  # a factor's layout
        sweep = _Sweep(W, U, *(rounding or (None, W.dtype)), in_graphs=False)
        if rounding is not None:
            sweep.scales = torch.ones(outputs, 1, dtype=torch.float32, device=stream.device)
        run = partial(sweep.prune, list(parts)) if parts else partial(sweep.eliminate, 0, columns)
        return sweep, captured(run, stream)


def _can_capture(W: Float[Tensor, "in out"]) -> bool:
    """Whether the weight is on a GPU and has enough columns for a capture to pay."""
    return W.is_cuda and len(W) >= FEWEST


def _is_launches_alone(part: Part) -> bool:
    """Whether the part's mask is chosen without a synchronisation, which no graph can capture."""
    start, stop, pattern = part
    if pattern is None:
        return True
    if pattern.always_zero() is not None:  # a graph would hold on to them
        return False
    groups = list(pattern.groups(stop - start))
    return bool(groups) and all(b - a <= PAIRWISE_WIDTH for a, b in groups)


def _runs(parts: list[Part], grid: Grid | None) -> list[list[Part]]:
    """The parts in the shortest runs of whole groups of the grid; one run if it has no groups.

    All columns of a run are up to date when the walk gets to it, so that scales can be chosen.
    """
    runs: list[list[Part]] = [[]]
    for part in parts:
        runs[-1].append(part)
        if grid is not None and grid.group_size is not None and part[1] % grid.group_size == 0:
            runs.append([])
    return [run for run in runs if run]


def _upper_factor(gram: Tensor, damping: float) -> tuple[Tensor, str]:
    """U with U^T U = (G + damping mean(diag G) I)^-1, the damping raised until U exists.

    With rows and columns reversed, a lower factor of H becomes an upper R with R R^T = H, and
    U = R^-1: one factorisation and one triangular solve, without forming the inverse of H.
    """
    dead, mean = gram.diagonal() == 0, gram.diagonal().mean()
    for step in range(DAMPING_STEPS):
        raised = damping * 10**step
        H = gram.clone()
        H.diagonal()[dead] = 1
        H.diagonal().add_(raised * mean)
        L, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
        if not failed:
            eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
            U = torch.linalg.solve_triangular(L.flip(0, 1), eye, upper=True)
            return U, f"damping raised from {damping:g} to {raised:g}" if step else ""
    raise ValueError(
        f"sparsegpt needs a Hessian that can be factorised, this one cannot with damping "
        f"{raised:g}: add calibration data, or check it for extreme activations"
    )
