"""Masks and test weights: N:M by magnitude, random blocks, random 1:2."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from secateur.criteria import magnitude
from secateur.patterns import NM, Block


def mask_creator(tensor: Float[Tensor, "..."], N: int = 2, M: int = 4) -> Float[Tensor, "..."]:
    """The mask, 1 = keep, of the N largest magnitudes in every M along the input dimension.

    The input dimension is the second of a Conv2d's weight, the last of any other. Ties keep the
    first. The mask has the tensor's dtype.

    Raises:
        ValueError: if it is no weight, or its input dimension no multiple of M.
    """
    if tensor.dim() < 2:
        raise ValueError(
            f"mask_creator needs a weight of at least two dimensions, got shape "
            f"{tuple(tensor.shape)}: view it as [out, in]"
        )
    inputs = 1 if tensor.dim() == 4 else -1
    rows = tensor.movedim(inputs, -1)
    mask = NM(N, M).mask(magnitude(rows.flatten(0, -2)))
    return mask.view(rows.shape).movedim(-1, inputs).contiguous().to(tensor.dtype)


def create_block_sparse_tensor(
    M: int,
    N: int,
    blocksize: int,
    sparsity: float,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Shaped[Tensor, "M N"]:
    """Ones in random blocks, zeros in exactly the share `sparsity` of the blocks.

    It is on the GPU if there is one and no device is named.

    Raises:
        ValueError: if the block does not divide the shape, or the sparsity is not in [0, 1).
    """
    device = _device(device)
    mask = Block(blocksize, blocksize, sparsity).mask(torch.rand(M, N, device=device))
    return mask.to(dtype)


def create_semi_structured_tensor(
    r: int, c: int, dtype: torch.dtype, device: torch.device | str | None = None
) -> Shaped[Tensor, "r c"]:
    """Random weights from 1 to 2, one of every two, the other 0; this is also 2:4 and 4:8.

    It is on the GPU if there is one and no device is named.

    Raises:
        ValueError: if the number of columns is odd.
    """
    device = _device(device)
    mask = NM(1, 2).mask(torch.rand(r, c, device=device))
    return ((1 + torch.rand(r, c, device=device)) * mask).to(dtype)


def _device(device: torch.device | str | None) -> torch.device | str:
    if device is not None:
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
