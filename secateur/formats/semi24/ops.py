"""The operators of the 2:4 format.

secateur::semi24_linear(Tensor x, Tensor values, Tensor metadata, Tensor? bias,
                        int out_features, int in_features,
                        Tensor[] arrangement, str dispatch) -> Tensor
secateur::semi24_unpack(Tensor values, Tensor metadata,
                        int out_features, int in_features) -> Tensor
"""

import torch
from torch._ops import OpOverload

from secateur.formats.contract import Implementation
from secateur.formats.op import define, differentiate
from secateur.formats.semi24.packed import PackedSemi24, unpack

TENSORS = ("values", "metadata")


def register(implementations: tuple[Implementation, ...]) -> tuple[OpOverload, OpOverload]:
    """`semi24_linear` and `semi24_unpack`, newly defined; called once, on import of the format."""
    define("semi24", PackedSemi24, TENSORS, unpack, implementations)
    operators = torch.ops.secateur.semi24_linear.default, torch.ops.secateur.semi24_unpack.default
    differentiate(*operators, len(TENSORS))
    return operators
