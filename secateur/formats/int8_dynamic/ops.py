"""The operators of the dynamic dense int8 format.

secateur::int8_dynamic_linear(
    Tensor x, Tensor values, Tensor scales, Tensor? bias,
    int out_features, int in_features, Tensor[] arrangement, str dispatch
) -> Tensor
secateur::int8_dynamic_unpack(
    Tensor values, Tensor scales, int out_features, int in_features
) -> Tensor
"""

import torch
from torch._ops import OpOverload

from secateur.formats.contract import Implementation
from secateur.formats.int8_dynamic.packed import PackedInt8Dynamic, unpack
from secateur.formats.op import define, differentiate

TENSORS = ("values", "scales")


def register(implementations: tuple[Implementation, ...]) -> tuple[OpOverload, OpOverload]:
    """The format's two operators, newly defined; called once, on import.

    The gradient is that of the unrounded inputs (straight through): `grad @ weight`.
    """
    define("int8_dynamic", PackedInt8Dynamic, TENSORS, unpack, implementations)
    operators = (
        torch.ops.secateur.int8_dynamic_linear.default,
        torch.ops.secateur.int8_dynamic_unpack.default,
    )
    differentiate(*operators, len(TENSORS))
    return operators
