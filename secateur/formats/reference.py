"""The linear that defines what is correct, and its gradients: dense, on the unpacked weight."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from secateur.formats.contract import Gradients, Implementation, Packed


def anywhere(packed: Packed, tokens: int) -> str | None:
    """Always None: the definition runs wherever torch runs."""
    return None


def linear(
    x: Float[Tensor, "tokens in"], packed: Packed, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """`x @ unpack(packed).T + bias`; in float32 and rounded once where the weight is quantised.

    Cost: unpacks the weight at every call.
    """
    weight = packed.format.unpack(packed)
    offset = None if bias is None else bias.to(weight.dtype)
    return dense_linear(x.to(weight.dtype), weight, offset).to(x.dtype)


def input_gradient(grad: Float[Tensor, "tokens out"], packed: Packed) -> Float[Tensor, "tokens in"]:
    """`grad @ weight`."""
    return grad @ packed.dense()


def values_gradient(
    grad: Float[Tensor, "tokens out"], x: Float[Tensor, "tokens in"], packed: Packed
) -> Float[Tensor, "..."]:
    """What `grad.T @ x` has at the places of an exact format's `values`.

    The places are where unpacking puts the numbers 1, 2, 3, ... in their stead.

    Cost: a dense gradient, and two dense weights of 64 bits.
    """
    values = packed["values"]
    numbers = torch.arange(1, values.numel() + 1, dtype=torch.float64, device=values.device)
    tensors = {**packed.tensors, "values": numbers.view(values.shape)}
    places = packed.format.unpack(replace(packed, tensors=tensors)).long()
    result = torch.zeros_like(values, memory_format=torch.contiguous_format)
    kept = places > 0
    result.view(-1)[places[kept] - 1] = (grad.t() @ x)[kept]
    return result


GRADIENTS = Gradients(input_gradient, values_gradient)
REFERENCE = Implementation("reference", linear, anywhere)
