"""The names of `torchao.prototype.sparsity` and `torch.ao.pruning`."""

from secateur.compat.torchao.base_scheduler import BaseScheduler
from secateur.compat.torchao.base_sparsifier import BaseSparsifier
from secateur.compat.torchao.fake_sparsity import FakeSparsity
from secateur.compat.torchao.names import fqn_to_module, get_arg_info_from_tensor_fqn, module_to_fqn
from secateur.compat.torchao.schedulers import CubicSL, LambdaSL
from secateur.compat.torchao.sparsifiers import NearlyDiagonalSparsifier, WeightNormSparsifier

__all__ = [
    "BaseScheduler",
    "BaseSparsifier",
    "CubicSL",
    "FakeSparsity",
    "LambdaSL",
    "NearlyDiagonalSparsifier",
    "WeightNormSparsifier",
    "fqn_to_module",
    "get_arg_info_from_tensor_fqn",
    "module_to_fqn",
]
