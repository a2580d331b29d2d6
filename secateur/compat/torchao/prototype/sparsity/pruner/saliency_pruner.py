"""The names of `torchao.prototype.sparsity.pruner.saliency_pruner`."""

from secateur.compat.torchao.structured.pruners import SaliencyPruner

__all__ = ["SaliencyPruner"]
