"""The operators of the dynamic dense fp8 format.

secateur::fp8_dynamic_linear(
    Tensor x, Tensor values, Tensor scales, Tensor? bias,
    int out_features, int in_features, Tensor[] arrangement, str dispatch
) -> Tensor
secateur::fp8_dynamic_unpack(
    Tensor values, Tensor scales, int out_features, int in_features
) -> Tensor
"""

import torch
from torch._ops import OpOverload

from secateur.formats.contract import Implementation
from secateur.formats.fp8_dynamic.packed import PackedFp8Dynamic, unpack
from secateur.formats.op import define, differentiate

TENSORS = ("values", "scales")


def register(implementations: tuple[Implementation, ...]) -> tuple[OpOverload, OpOverload]:
    """The format's two operators, newly defined; called once, on import.

    The gradient is that of the unrounded inputs (straight through): `grad @ weight`.
    """
    define("fp8_dynamic", PackedFp8Dynamic, TENSORS, unpack, implementations)
    operators = (
        torch.ops.secateur.fp8_dynamic_linear.default,
        torch.ops.secateur.fp8_dynamic_unpack.default,
    )
    differentiate(*operators, len(TENSORS))
    return operators
