"""The names of `torchao.sparsity.training.autograd`."""

from secateur.compat.torchao.semi_sparse import semi_structured_sparsify

__all__ = ["semi_structured_sparsify"]
