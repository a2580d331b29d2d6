"""2:4 weights on a CPU: the stored form, multiplied as it is.

Shared by `semi24` and its quantised forms. Kept values and 2-bit positions are what the kernel
reads: a vector of positions picks from a vector of inputs (`kernels/simd`). Each token has its own
picks, so that from `MANY` tokens on the dense weight, made for one call, is faster.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from secateur.formats.contract import Bound, Implementation, Packed
from secateur.formats.kernels import simd

MANY = 48  # tokens; measured crossover between 32 and 64

Kind = Callable[[Packed], int]


def two_of_four(kind: Kind) -> Implementation:
    """For every 2:4 format whose inputs are not rounded; `kind` says how its values are read."""
    return Implementation(
        "simd", partial(_linear, kind), _why_not_two_of_four, bind=partial(_bind, kind)
    )


def why_not(packed: Packed, format: str) -> str | None:
    """Why the kernels for a CPU cannot run this layer, or None."""
    scales = packed.tensors.get("scales")
    device, dtype = packed.device.type, packed.dtype if scales is None else scales.dtype
    if device != "cpu":
        return f"{format} simd needs a weight on the CPU, got {device}"
    if dtype not in simd.FLOATS:
        return f"{format} simd needs float32, bfloat16 or float16, got {dtype}: cast the layer"
    return simd.why_not()


def contiguous(packed: Packed, bias: Tensor | None) -> tuple[Packed, Tensor | None]:
    """The weight and the bias as the kernels read them: these very tensors, nearly always."""
    tensors = {name: tensor.contiguous() for name, tensor in packed.tensors.items()}
    if bias is not None:
        bias = (bias if bias.dtype in simd.FLOATS else bias.to(torch.float32)).contiguous()
    return replace(packed, tensors=tensors), bias


def stored_floats(packed: Packed) -> int:
    """How values are read that are stored as they are."""
    return simd.FLOATS[packed["values"].dtype]


def _why_not_two_of_four(packed: Packed, tokens: int) -> str | None:
    return why_not(packed, str(packed.format))


def _bind(kind: Kind, packed: Packed, bias: Float[Tensor, " out"] | None) -> Bound:
    run = simd.two_of_four(packed.shape, *_parts(kind, packed), bias, packed.dtype)
    return Bound(run, MANY - 1)


def _linear(
    kind: Kind,
    x: Float[Tensor, "tokens in"],
    packed: Packed,
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T + bias`, summed in float32 and rounded once.

    Cost: from `MANY` tokens on, one dense weight.
    """
    packed, bias = contiguous(packed, bias)
    if len(x) < MANY:
        return _bind(kind, packed, bias).run(x)
    weight = simd.dense_two_of_four(packed.shape, *_parts(kind, packed))
    offset = None if bias is None else bias.to(weight.dtype)
    return dense_linear(x.to(weight.dtype), weight, offset).to(x.dtype)


def _parts(kind: Kind, packed: Packed) -> tuple[Tensor, Tensor, int, Tensor | None]:
    return packed["values"], packed["metadata"], kind(packed), packed.tensors.get("scales")
