"""The names of `torchao.sparsity.utils`."""

from secateur.compat.torchao.tensors import (
    create_block_sparse_tensor,
    create_semi_structured_tensor,
    mask_creator,
)
from secateur.compat.torchao.wanda import PerChannelNormObserver

__all__ = [
    "PerChannelNormObserver",
    "create_block_sparse_tensor",
    "create_semi_structured_tensor",
    "mask_creator",
]
