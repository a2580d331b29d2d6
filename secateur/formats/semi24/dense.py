"""2:4 weights multiplied dense on a GPU, for the numbers of tokens at which that is faster."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from secateur.formats.contract import Arrangement, Packed
from secateur.formats.kernels.gpu import why_no_gpu


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why the layer does not run dense, or None: only on a GPU in 16 bits is it also run sparse."""
    device, dtype = packed.device, packed.dtype
    if (problem := why_no_gpu(device)) is not None:
        return problem
    if dtype not in (torch.bfloat16, torch.float16):
        return (
            f"running dense needs bfloat16 or float16, got {dtype}: leave the layer unpacked, "
            "nothing multiplies it sparse"
        )
    return None


def arrange(packed: Packed) -> dict[str, Tensor]:
    """The dense weight, made on load and never saved.

    Cost: all of the dense weight's bytes, beside the 0.5625 that are stored: a layer that runs this
        takes more memory than one that was never packed.
    """
    return {"dense": packed.dense()}


DENSE = Arrangement(("dense",), arrange)


def linear(
    x: Float[Tensor, "tokens in"],
    packed: Packed,
    bias: Float[Tensor, " out"] | None,
) -> Float[Tensor, "tokens out"]:
    """`x @ W.T + bias`, as `nn.Linear` computes it."""
    return dense_linear(x, packed["dense"], bias)
