"""The names of `torchao.prototype.sparsity.superblock.blocksparse`."""

from secateur.compat.torchao.configs import BlockSparseWeightConfig, block_sparse_weight

__all__ = ["BlockSparseWeightConfig", "block_sparse_weight"]
