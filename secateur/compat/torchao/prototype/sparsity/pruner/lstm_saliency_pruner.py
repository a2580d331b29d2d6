"""The names of `torchao.prototype.sparsity.pruner.lstm_saliency_pruner`."""

from secateur.compat.torchao.structured_pruners import LSTMSaliencyPruner

__all__ = ["LSTMSaliencyPruner"]
