"""The names of `torchao.sparsity.supermask`."""

from secateur.compat.torchao.supermask import SupermaskLinear

__all__ = ["SupermaskLinear"]
