"""The names of `torchao.prototype.sparsity.pruner.FPGM_pruner`."""

from secateur.compat.torchao.structured.pruners import FPGMPruner

__all__ = ["FPGMPruner"]
