"""The names of `torchao.prototype.sparsity.pruner.lstm_saliency_pruner`."""

from secateur.compat.torchao.structured.pruners import LSTMSaliencyPruner

__all__ = ["LSTMSaliencyPruner"]
