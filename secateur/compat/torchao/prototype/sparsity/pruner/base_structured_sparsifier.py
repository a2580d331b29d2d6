"""The names of `torchao.prototype.sparsity.pruner.base_structured_sparsifier`."""

from secateur.compat.torchao.structured.sparsifier import BaseStructuredSparsifier

__all__ = ["BaseStructuredSparsifier"]
