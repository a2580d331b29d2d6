"""The names of `torchao.prototype.sparsity.sparsifier.nearly_diagonal_sparsifier`."""

from secateur.compat.torchao.sparsifiers import NearlyDiagonalSparsifier

__all__ = ["NearlyDiagonalSparsifier"]
