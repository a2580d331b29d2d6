"""The names of `torchao.prototype.sparsity.pruner.parametrization`."""

from secateur.compat.torchao.structured.sparsifier import FakeStructuredSparsity

__all__ = ["FakeStructuredSparsity"]
