"""To and from torch's own sparse tensors: for interchange with other code, not for speed.

On a CPU torch's own `F.linear` on CSR and BSR tensors runs at 0.02-0.9x of dense speed up to 80 %
zeros, in float32 and float64 alone. Convert to hand a weight to somebody else's
code, or to read one; to run a model use `accelerate_`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats import compressed_rows
from secateur.formats.contract import Packed

LAYOUTS = {
    "sparse_coo": torch.sparse_coo,
    "sparse_csr": torch.sparse_csr,
    "sparse_csc": torch.sparse_csc,
    "sparse_bsr": torch.sparse_bsr,
}
BSR_BLOCK = (64, 64)  # of a dense weight; a packed block weight keeps its own


def to_torch_sparse(weight: Packed | Tensor, layout: str) -> Tensor:
    """The weight as a torch sparse tensor of the named layout, values exact.

    A dense weight becomes BSR in blocks of 64 x 64; a packed block weight keeps its own blocks.

    Cost: one dense weight, except from block to BSR and from csr to CSR, which share their values.
    Raises: ValueError for an unknown layout, or a shape that the blocks do not divide.
    """
    if layout not in LAYOUTS:
        raise ValueError(
            f"to_torch_sparse needs one of {', '.join(LAYOUTS)}, got {layout!r}: choose one of them"
        )
    if not isinstance(weight, Tensor):
        direct = _direct(weight, layout)
        if direct is not None:
            return direct
    dense = weight if isinstance(weight, Tensor) else weight.dense()
    rows, cols = BSR_BLOCK
    if layout == "sparse_bsr" and (dense.shape[0] % rows or dense.shape[1] % cols):
        raise ValueError(
            f"sparse_bsr needs a shape that is a multiple of {rows}x{cols}, "
            f"got {tuple(dense.shape)}: pack it with a block that divides it and convert that"
        )
    with _without_beta_notice():
        blocksize = BSR_BLOCK if layout == "sparse_bsr" else None
        return dense.detach().to_sparse(layout=LAYOUTS[layout], blocksize=blocksize)


def from_torch_sparse(tensor: Tensor) -> Float[Tensor, "out in"]:
    """The dense weight that a torch sparse tensor of any layout holds; COO duplicates are summed.

    Raises: ValueError if the tensor is not sparse or not a matrix.
    """
    if tensor.layout == torch.strided:
        raise ValueError(
            "from_torch_sparse needs a torch sparse tensor, got a dense one: use it as it is"
        )
    if tensor.dim() != 2:
        raise ValueError(
            f"from_torch_sparse needs a matrix [out, in], got shape {tuple(tensor.shape)}: "
            "convert its matrices one by one"
        )
    return tensor.detach().to_dense()


def _direct(packed: Packed, layout: str) -> Tensor | None:
    """The tensors themselves, where the packed form and torch's agree."""
    tensors = packed.tensors
    own = "sparse_bsr" if tensors["values"].dim() == 3 else "sparse_csr"  # blocks, or weights
    if packed.format.tensors != compressed_rows.TENSORS or layout != own:
        return None
    with _without_beta_notice():
        return torch.sparse_compressed_tensor(
            tensors["crow_indices"],
            tensors["col_indices"],
            tensors["values"],
            size=packed.shape,
            layout=LAYOUTS[layout],
            check_invariants=True,
        )


@contextmanager
def _without_beta_notice() -> Iterator[None]:
    """Hide torch's notices about compressed layouts (beta; checks off): the caller named one."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Sparse (.* tensor support is in beta|invariant checks)"
        )
        yield
