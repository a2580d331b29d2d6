"""The names of `torchao.prototype.sparsity.superblock`."""
