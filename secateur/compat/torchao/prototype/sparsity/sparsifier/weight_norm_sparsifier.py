"""The names of `torchao.prototype.sparsity.sparsifier.weight_norm_sparsifier`."""

from secateur.compat.torchao.sparsifiers import WeightNormSparsifier

__all__ = ["WeightNormSparsifier"]
