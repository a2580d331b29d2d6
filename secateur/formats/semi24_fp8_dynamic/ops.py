"""The operators of the dynamic 2:4 fp8 format.

secateur::semi24_fp8_dynamic_linear(
    Tensor x, Tensor values, Tensor metadata, Tensor scales, Tensor? bias,
    int out_features, int in_features, Tensor[] arrangement, str dispatch
) -> Tensor
secateur::semi24_fp8_dynamic_unpack(
    Tensor values, Tensor metadata, Tensor scales, int out_features, int in_features
) -> Tensor
"""

import torch
from torch._ops import OpOverload

from secateur.formats.contract import Implementation
from secateur.formats.op import define, differentiate
from secateur.formats.semi24_fp8_dynamic.packed import PackedSemi24Fp8Dynamic, unpack

TENSORS = ("values", "metadata", "scales")


def register(implementations: tuple[Implementation, ...]) -> tuple[OpOverload, OpOverload]:
    """The format's two operators, newly defined; called once, on import.

    The gradient is that of the unrounded inputs (straight through): `grad @ weight`.
    """
    define("semi24_fp8_dynamic", PackedSemi24Fp8Dynamic, TENSORS, unpack, implementations)
    operators = (
        torch.ops.secateur.semi24_fp8_dynamic_linear.default,
        torch.ops.secateur.semi24_fp8_dynamic_unpack.default,
    )
    differentiate(*operators, len(TENSORS))
    return operators
