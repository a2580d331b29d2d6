"""The operators of the csr format.

secateur::csr_linear(Tensor x, Tensor values, Tensor crow_indices, Tensor col_indices,
                     Tensor? bias, int out_features, int in_features,
                     Tensor[] arrangement, str dispatch) -> Tensor
secateur::csr_unpack(Tensor values, Tensor crow_indices, Tensor col_indices,
                     int out_features, int in_features) -> Tensor
"""

import torch
from torch._ops import OpOverload

from secateur.formats.contract import Implementation
from secateur.formats.csr.packed import PackedCsr, unpack
from secateur.formats.op import define, differentiate

TENSORS = ("values", "crow_indices", "col_indices")


def register(implementations: tuple[Implementation, ...]) -> tuple[OpOverload, OpOverload]:
    """`csr_linear` and `csr_unpack`, newly defined; called once, when the format is imported."""
    define("csr", PackedCsr, TENSORS, unpack, implementations)
    operators = torch.ops.secateur.csr_linear.default, torch.ops.secateur.csr_unpack.default
    differentiate(*operators, len(TENSORS))
    return operators
