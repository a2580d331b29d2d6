"""The names of `torchao.sparsity` and `torch.ao.pruning`, called as before.

They differ only where the old ones went wrong, as the migration guide (`docs/migrate.md`) lists.
The old import paths are below this one: `torchao.X` is `secateur.compat.torchao.X`,
`torch.ao.pruning` is `secateur.compat.torchao.prototype.sparsity`.
"""

from secateur.compat.torchao.base_scheduler import BaseScheduler
from secateur.compat.torchao.base_sparsifier import BaseSparsifier
from secateur.compat.torchao.configs import (
    BlockSparseLayout,
    BlockSparseWeightConfig,
    CutlassSemiSparseLayout,
    Float8DynamicActivationFloat8SemiSparseWeightConfig,
    Float8DynamicActivationFloat8WeightConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    MarlinSparseLayout,
    PlainLayout,
    SemiSparseLayout,
    SemiSparseWeightConfig,
    block_sparse_weight,
    float8_dynamic_activation_float8_semi_sparse_weight,
    float8_dynamic_activation_float8_weight,
    int4_weight_only,
    int8_dynamic_activation_int8_semi_sparse_weight,
    int8_dynamic_activation_int8_weight,
    semi_sparse_weight,
)
from secateur.compat.torchao.fake_sparsity import FakeSparsity
from secateur.compat.torchao.inference import apply_fake_sparsity, quantize_, sparsify_
from secateur.compat.torchao.names import (
    fqn_to_module,
    get_arg_info_from_tensor_fqn,
    module_to_fqn,
)
from secateur.compat.torchao.schedulers import CubicSL, LambdaSL
from secateur.compat.torchao.semi_sparse import (
    SemiSparseActivationLinear,
    SemiSparseLinear,
    semi_structured_sparsify,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
)
from secateur.compat.torchao.sparsifiers import NearlyDiagonalSparsifier, WeightNormSparsifier
from secateur.compat.torchao.structured.pruners import (
    FPGMPruner,
    LSTMSaliencyPruner,
    SaliencyPruner,
)
from secateur.compat.torchao.structured.sparsifier import (
    BaseStructuredSparsifier,
    FakeStructuredSparsity,
)
from secateur.compat.torchao.supermask import SupermaskLinear
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
    "BaseStructuredSparsifier",
    "BlockSparseLayout",
    "BlockSparseWeightConfig",
    "CubicSL",
    "CutlassSemiSparseLayout",
    "FPGMPruner",
    "FakeSparsity",
    "FakeStructuredSparsity",
    "Float8DynamicActivationFloat8SemiSparseWeightConfig",
    "Float8DynamicActivationFloat8WeightConfig",
    "Int4WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "LSTMSaliencyPruner",
    "LambdaSL",
    "MarlinSparseLayout",
    "NearlyDiagonalSparsifier",
    "PerChannelNormObserver",
    "PlainLayout",
    "SaliencyPruner",
    "SemiSparseActivationLinear",
    "SemiSparseLayout",
    "SemiSparseLinear",
    "SemiSparseWeightConfig",
    "SupermaskLinear",
    "WandaSparsifier",
    "WeightNormSparsifier",
    "apply_fake_sparsity",
    "block_sparse_weight",
    "create_block_sparse_tensor",
    "create_semi_structured_tensor",
    "float8_dynamic_activation_float8_semi_sparse_weight",
    "float8_dynamic_activation_float8_weight",
    "fqn_to_module",
    "get_arg_info_from_tensor_fqn",
    "int4_weight_only",
    "int8_dynamic_activation_int8_semi_sparse_weight",
    "int8_dynamic_activation_int8_weight",
    "mask_creator",
    "module_contains_param",
    "module_to_fqn",
    "quantize_",
    "semi_sparse_weight",
    "semi_structured_sparsify",
    "sparsify_",
    "swap_linear_with_semi_sparse_linear",
    "swap_module",
    "swap_semi_sparse_linear_with_linear",
]
