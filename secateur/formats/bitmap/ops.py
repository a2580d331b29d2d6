"""The operators of the bitmap format.

secateur::bitmap_linear(Tensor x, Tensor values, Tensor bitmask, Tensor? bias,
                        int out_features, int in_features,
                        Tensor[] arrangement, str dispatch) -> Tensor
secateur::bitmap_unpack(Tensor values, Tensor bitmask,
                        int out_features, int in_features) -> Tensor
"""

import torch
from torch._ops import OpOverload

from secateur.formats.bitmap.packed import PackedBitmap, unpack
from secateur.formats.contract import Implementation
from secateur.formats.op import define, differentiate

TENSORS = ("values", "bitmask")


def register(implementations: tuple[Implementation, ...]) -> tuple[OpOverload, OpOverload]:
    """`bitmap_linear` and `bitmap_unpack`, newly defined; called once, on import of the format."""
    define("bitmap", PackedBitmap, TENSORS, unpack, implementations)
    operators = torch.ops.secateur.bitmap_linear.default, torch.ops.secateur.bitmap_unpack.default
    differentiate(*operators, len(TENSORS))
    return operators
