"""The names of `torchao.prototype.sparsity.sparsifier`."""
