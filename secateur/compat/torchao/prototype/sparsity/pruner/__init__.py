"""The names of `torchao.prototype.sparsity.pruner`."""

from secateur.compat.torchao.structured import BaseStructuredSparsifier, FakeStructuredSparsity
from secateur.compat.torchao.structured_pruners import (
    FPGMPruner,
    LSTMSaliencyPruner,
    SaliencyPruner,
)

__all__ = [
    "BaseStructuredSparsifier",
    "FPGMPruner",
    "FakeStructuredSparsity",
    "LSTMSaliencyPruner",
    "SaliencyPruner",
]
