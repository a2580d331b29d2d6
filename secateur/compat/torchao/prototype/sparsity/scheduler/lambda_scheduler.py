"""The names of `torchao.prototype.sparsity.scheduler.lambda_scheduler`."""

from secateur.compat.torchao.schedulers import LambdaSL

__all__ = ["LambdaSL"]
