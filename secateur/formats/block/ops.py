"""The operators of the block format.

secateur::block_linear(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices,
                       Tensor? bias, int out_features, int in_features,
                       Tensor[] arrangement, str dispatch) -> Tensor
secateur::block_unpack(Tensor values, Tensor crow_indices, Tensor col_indices,
                       int out_features, int in_features) -> Tensor
"""

import torch
from torch._ops import OpOverload

from secateur.formats.block.packed import PackedBlock, unpack
from secateur.formats.contract import Implementation
from secateur.formats.op import define, differentiate

TENSORS = ("values", "crow_indices", "col_indices")


def register(implementations: tuple[Implementation, ...]) -> tuple[OpOverload, OpOverload]:
    """`block_linear` and `block_unpack`, newly defined; called once, on import of the format."""
    define("block", PackedBlock, TENSORS, unpack, implementations)
    operators = torch.ops.secateur.block_linear.default, torch.ops.secateur.block_unpack.default
    differentiate(*operators, len(TENSORS))
    return operators
