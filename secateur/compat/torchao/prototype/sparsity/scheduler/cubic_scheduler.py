"""The names of `torchao.prototype.sparsity.scheduler.cubic_scheduler`."""

from secateur.compat.torchao.schedulers import CubicSL

__all__ = ["CubicSL"]
