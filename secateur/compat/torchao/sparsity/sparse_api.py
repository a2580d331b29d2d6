"""The names of `torchao.sparsity.sparse_api`."""

from secateur.compat.torchao.configs import (
    BlockSparseWeightConfig,
    SemiSparseWeightConfig,
    block_sparse_weight,
    int8_dynamic_activation_int8_semi_sparse_weight,
    semi_sparse_weight,
)
from secateur.compat.torchao.inference import apply_fake_sparsity, sparsify_

__all__ = [
    "BlockSparseWeightConfig",
    "SemiSparseWeightConfig",
    "apply_fake_sparsity",
    "block_sparse_weight",
    "int8_dynamic_activation_int8_semi_sparse_weight",
    "semi_sparse_weight",
    "sparsify_",
]
