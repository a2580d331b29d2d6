"""The names of `torchao.prototype.sparsity.scheduler.base_scheduler`."""

from secateur.compat.torchao.base_scheduler import BaseScheduler

__all__ = ["BaseScheduler"]
