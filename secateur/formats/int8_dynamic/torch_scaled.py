"""Dense int8 on a GPU through torch's own integer product, `torch._int_mm`.

Bytes for each output: 4 written by the product, then 4 read and the layer's 2 written by one pass
that applies both scales and the bias. torch's product has no scales of its own.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats import dynamic
from secateur.formats.int8_dynamic.packed import PackedInt8Dynamic, codes_of
from secateur.formats.kernels import quantise

MULTIPLE = 8  # of both sizes of the weight, as torch demands; tokens are padded to it
LEAST_ROWS = 24  # torch demands more than 16, and 24 is the next multiple


def why_not(packed: PackedInt8Dynamic, tokens: int) -> str | None:
    """None if torch's integer product can run this layer here, else the reason."""
    out, width = packed.shape
    if out % MULTIPLE or width % MULTIPLE or not out or not width:
        return (
            f"int8_dynamic torch needs out_features and in_features that are multiples of "
            f"{MULTIPLE}, got {out} x {width}: pad the layer with zeros"
        )
    if packed.dtype == torch.float64:
        return "int8_dynamic torch needs at most float32, got torch.float64: cast the layer"
    return dynamic.why_not(torch.int8, packed.values.device)


def linear(
    x: Float[Tensor, "tokens in"], packed: PackedInt8Dynamic, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """The definition's result: sums are exact integers, scaled in float32 and rounded once."""
    rows = max(LEAST_ROWS, -(-len(x) // MULTIPLE) * MULTIPLE)
    tokens, token_scales = quantise.quantise(x, torch.int8, rows)
    sums = torch._int_mm(tokens, codes_of(packed).t())
    return quantise.scale_bias(sums, token_scales, packed.scales[:, 0], bias, x.dtype)
