"""The names of `torchao.prototype.sparsity.pruner`."""

from secateur.compat.torchao.structured.pruners import (
    FPGMPruner,
    LSTMSaliencyPruner,
    SaliencyPruner,
)
from secateur.compat.torchao.structured.sparsifier import (
    BaseStructuredSparsifier,
    FakeStructuredSparsity,
)

__all__ = [
    "BaseStructuredSparsifier",
    "FPGMPruner",
    "FakeStructuredSparsity",
    "LSTMSaliencyPruner",
    "SaliencyPruner",
]
