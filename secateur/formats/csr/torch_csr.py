"""CSR linear by torch's own sparse matmul (MKL's `mm` on a CPU).

The weight stands on the left, `weight @ x.T`: torch's `F.linear` on a CSR weight multiplies the
transpose instead, and measured 2-3x slower at 16 and 128 tokens.

Known limits: torch has this for float32 and float64 alone; it pays from 80-90 % zeros
(docs/formats/measured-cpu.md).
"""

import warnings
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats.contract import Packed


def why_not(packed: Packed, tokens: int) -> str | None:
    """Why torch cannot multiply this weight, or None for float32 and float64 on a CPU."""
    device, dtype = packed.device.type, packed.dtype
    if device != "cpu":
        return f"csr torch_csr needs a weight on the CPU, got {device}"
    if dtype not in (torch.float32, torch.float64):
        return (
            f"csr torch_csr needs float32 or float64 (torch has no other CSR matmul), got {dtype}"
        )
    if not torch.backends.mkl.is_available():
        return "csr torch_csr needs a torch built with MKL"
    return None


def linear(
    x: Float[Tensor, "tokens in"], packed: Packed, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    """`(weight @ x.T).T + bias`.

    Cost: x and y once more, transposed.
    """
    product = (_as_torch(packed) @ x.t()).t()
    return product if bias is None else product + bias


def _as_torch(packed: Packed) -> Tensor:
    _draw_notices()
    return _csr(packed["crow_indices"], packed["col_indices"], packed["values"], packed.shape)


def _csr(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    # checked when packed or loaded; here it would cost every call
    return torch.sparse_csr_tensor(crow, col, values, size=shape, check_invariants=False)


@cache
def _draw_notices() -> None:
    """Draw torch's once-per-process notices about CSR tensors where nobody sees them.

    They say that CSR is in beta and, in torch 2.11, that its checks are off, to those who chose
    torch's CSR tensors; here the choice is ours.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR tensor|invariant checks)")
        none = torch.zeros(1, dtype=torch.int32, device="cpu")
        _csr(none.repeat(2), none[:0], torch.zeros(0, dtype=torch.float32, device="cpu"), (1, 1))
