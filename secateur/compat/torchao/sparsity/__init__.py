"""The names of `torchao.sparsity`: those of its `sparse_api`, and three more."""

from secateur.compat.torchao.sparsity import sparse_api
from secateur.compat.torchao.sparsity.sparse_api import *  # noqa: F403  # all of __all__
from secateur.compat.torchao.supermask import SupermaskLinear
from secateur.compat.torchao.wanda import PerChannelNormObserver, WandaSparsifier

__all__ = ["PerChannelNormObserver", "SupermaskLinear", "WandaSparsifier", *sparse_api.__all__]
