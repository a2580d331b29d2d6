"""Published algorithms, transcribed line by line: slow, in float64, and independent of the library.

They define what the library's fast versions are compared with, in benches and in tests.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PAPER = "sparsegpt, algorithm 1 in float64"  # as rows and tables call it


def sparsegpt_algorithm_1(
    W: Float[Tensor, "d_row d_col"],
    G: Float[Tensor, "d_col d_col"],
    *,
    n: int = 0,
    m: int = 0,
    p: float = 0.0,
    B: int = 128,
    percent_damping: float = 0.01,
) -> tuple[Float[Tensor, "d_row d_col"], Bool[Tensor, "d_row d_col"]]:
    """SparseGPT, arXiv:2301.00774, algorithm 1, with B_s = B (unstructured) or m (n:m).

    G stands for X X^T, of which any multiple gives the same result. Returns the pruned weight and
    M.
    """
    W = W.double().clone()
    H = G.double().clone()
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H += percent_damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
    Hinv = torch.linalg.cholesky(torch.linalg.inv(H)).T  # rows of the upper factor of the inverse
    d_col = W.shape[1]
    M = torch.ones_like(W, dtype=torch.bool)
    for i in range(0, d_col, B):
        stop = min(i + B, d_col)
        E = torch.zeros_like(W[:, i:stop])
        for j in range(i, stop):
            if n == 0 and j == i:
                score = W[:, i:stop] ** 2 / Hinv.diagonal()[i:stop] ** 2
                # Rounded cumulatively, so that the whole weight has p d_row d_col zeros.
                zeros = int(p * len(W) * stop + 0.5) - int(p * len(W) * i + 0.5)
                drop = score.flatten().argsort()[:zeros]
                M[:, i:stop] = (
                    torch.ones_like(score).flatten().index_fill(0, drop, 0).view_as(score) > 0
                )
            elif n and j % m == 0:
                score = W[:, j : j + m] ** 2 / Hinv.diagonal()[j : j + m] ** 2
                drop = score.argsort(dim=1)[:, : m - n]
                M[:, j : j + m] = torch.ones_like(score).scatter(1, drop, 0).bool()
            E[:, j - i] = ~M[:, j] * W[:, j] / Hinv[j, j]
            W[:, j:stop] -= E[:, j - i, None] * Hinv[j, j:stop]
        W[:, stop:] -= E @ Hinv[i:stop, stop:]
    return W * M, M
