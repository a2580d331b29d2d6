"""The names of `torchao.prototype.sparsity.superblock.supermask`."""

from secateur.compat.torchao.supermask import SupermaskLinear

__all__ = ["SupermaskLinear"]
