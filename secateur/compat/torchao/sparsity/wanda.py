"""The names of `torchao.sparsity.wanda`."""

from secateur.compat.torchao.wanda import WandaSparsifier

__all__ = ["WandaSparsifier"]
