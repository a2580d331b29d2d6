"""The sparsifiers and schedulers of `torchao.sparsity` and `torch.ao.pruning`, under their names.

They take the old calls and configurations. What differs is where the old ones went wrong, and is
listed in the migration guide (`docs/migrate.md`).
"""

from secateur.compat.torchao.base_scheduler import BaseScheduler
from secateur.compat.torchao.base_sparsifier import BaseSparsifier
from secateur.compat.torchao.fake_sparsity import FakeSparsity
from secateur.compat.torchao.names import (
    fqn_to_module,
    get_arg_info_from_tensor_fqn,
    module_to_fqn,
)
from secateur.compat.torchao.schedulers import CubicSL, LambdaSL
from secateur.compat.torchao.sparsifiers import NearlyDiagonalSparsifier, WeightNormSparsifier
from secateur.compat.torchao.swap import module_contains_param, swap_module
from secateur.compat.torchao.tensors import (
    create_block_sparse_tensor,
    create_semi_structured_tensor,
    mask_creator,
)
from secateur.compat.torchao.wanda import PerChannelNormObserver, WandaSparsifier

__all__ = [
    "BaseScheduler",
    "BaseSparsifier",
    "CubicSL",
    "FakeSparsity",
    "LambdaSL",
    "NearlyDiagonalSparsifier",
    "PerChannelNormObserver",
    "WandaSparsifier",
    "WeightNormSparsifier",
    "create_block_sparse_tensor",
    "create_semi_structured_tensor",
    "fqn_to_module",
    "get_arg_info_from_tensor_fqn",
    "mask_creator",
    "module_contains_param",
    "module_to_fqn",
    "swap_module",
]
