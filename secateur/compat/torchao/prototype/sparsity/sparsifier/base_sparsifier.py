"""The names of `torchao.prototype.sparsity.sparsifier.base_sparsifier`."""

from secateur.compat.torchao.base_sparsifier import BaseSparsifier

__all__ = ["BaseSparsifier"]
