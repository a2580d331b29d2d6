"""The names of `torchao.prototype.sparsity.scheduler`."""
