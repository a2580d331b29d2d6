"""The names of `torchao.prototype.sparsity.sparsifier.utils`."""

from secateur.compat.torchao.fake_sparsity import FakeSparsity
from secateur.compat.torchao.names import fqn_to_module, get_arg_info_from_tensor_fqn, module_to_fqn
from secateur.compat.torchao.swap import module_contains_param, swap_module

__all__ = [
    "FakeSparsity",
    "fqn_to_module",
    "get_arg_info_from_tensor_fqn",
    "module_contains_param",
    "module_to_fqn",
    "swap_module",
]
