"""The operators of the 2:4 fp8 format.

secateur::semi24_fp8_linear(Tensor x, Tensor values, Tensor metadata, Tensor scales, Tensor? bias,
                            int out_features, int in_features,
                            Tensor[] arrangement, str dispatch) -> Tensor
secateur::semi24_fp8_unpack(Tensor values, Tensor metadata, Tensor scales,
                            int out_features, int in_features) -> Tensor
"""

import torch
from torch._ops import OpOverload

from secateur.formats.contract import Implementation
from secateur.formats.op import define, differentiate
from secateur.formats.semi24_fp8.packed import PackedSemi24Fp8, unpack

TENSORS = ("values", "metadata", "scales")


def register(implementations: tuple[Implementation, ...]) -> tuple[OpOverload, OpOverload]:
    """`semi24_fp8_linear` and `semi24_fp8_unpack`, newly defined; called once, on import."""
    define("semi24_fp8", PackedSemi24Fp8, TENSORS, unpack, implementations)
    operators = (
        torch.ops.secateur.semi24_fp8_linear.default,
        torch.ops.secateur.semi24_fp8_unpack.default,
    )
    differentiate(*operators, len(TENSORS))
    return operators
