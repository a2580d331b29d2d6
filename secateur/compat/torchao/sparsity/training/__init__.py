"""The names of `torchao.sparsity.training`."""

from secateur.compat.torchao.semi_sparse import (
    SemiSparseActivationLinear,
    SemiSparseLinear,
    semi_structured_sparsify,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
)

__all__ = [
    "SemiSparseActivationLinear",
    "SemiSparseLinear",
    "semi_structured_sparsify",
    "swap_linear_with_semi_sparse_linear",
    "swap_semi_sparse_linear_with_linear",
]
