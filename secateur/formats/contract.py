"""What every format provides, and the checks that all of them make on a dense weight.

A format is a folder with four roles: `packed.py` (how a weight is stored), `reference.py` (what its
linear computes), one file an implementation (how that can be run) and `__init__.py` (the tuple of
implementations, in order of preference, and the names that torch knows the format by).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor
from torch._ops import OpOverload

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
QUANTISABLE = (torch.float32, torch.bfloat16, torch.float16)
MOST_WEIGHTS = 2**31 - 1  # crow_indices and col_indices are int32


@runtime_checkable
class Packed(Protocol):
    """A packed weight: its dense shape and the plain tensors that a checkpoint stores.

    `dtype` is that of the dense weight: of `scales` where the format has them, else of `values`.
    """

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def values(self) -> Tensor: ...
    @property
    def format(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def tensors(self) -> dict[str, Tensor]: ...


def _no_arrangement(packed: Packed) -> tuple[Tensor, ...]:
    return ()


@dataclass(frozen=True)
class Implementation:
    """One way to run a format's linear.

    `linear(x, packed, bias, *arranged)` multiplies `[tokens, in]` by the packed weight, and
    `why_not(packed, tokens)` is None where it can run here, else the reason. It reads shapes, dtype
    and device only. `arrange(packed)` makes the tensors named in `arrangement`, which only this
    implementation can read: they are made when a weight is packed or loaded and never saved.

    `activations` are those of `secateur.formats.activations` that `linear` applies to its results
    itself where it is called with `activation`, for less than another pass over them.
    """

    name: str
    linear: Callable[..., Tensor]
    why_not: Callable[..., str | None]
    arrangement: tuple[str, ...] = ()
    arrange: Callable[..., tuple[Tensor, ...]] = _no_arrangement
    activations: tuple[str, ...] = ()


@runtime_checkable
class Folder(Protocol):
    """What the package of a format exports, so that layers and measurements treat all alike.

    `dequantised(packed)` is the weight that the linear multiplies by, before any rounding to the
    layer's dtype, where `pack` rounds weights to a grid; None where packing is exact.
    """

    @property
    def IMPLEMENTATIONS(self) -> tuple[Implementation, ...]: ...
    @property
    def LINEAR(self) -> OpOverload: ...
    @property
    def UNPACK(self) -> OpOverload: ...
    @property
    def packed_type(self) -> Callable[..., Packed]: ...
    @property
    def pack(self) -> Callable[..., Packed]: ...
    @property
    def unpack(self) -> Callable[..., Tensor]: ...
    @property
    def dequantised(self) -> Callable[..., Tensor] | None: ...
    @property
    def why_not(self) -> Callable[..., str | None]: ...
    @property
    def density(self) -> Callable[..., float]: ...
    @property
    def empty(self) -> Callable[..., Packed]: ...
    @property
    def broken(self) -> Callable[..., str | None]: ...


def typed_tensor(names: Collection[str]) -> str:
    """Which of a format's tensors has the dense weight's dtype; casting a layer casts it alone."""
    return "scales" if "scales" in names else "values"


def packed_bytes(packed: Packed) -> int:
    """Bytes of the tensors that a checkpoint stores."""
    return sum(tensor.nbytes for tensor in packed.tensors().values())


def first_true(mask: Bool[Tensor, "out in"]) -> tuple[int, int]:
    """Row and column of the first True in row order; the caller knows that there is one."""
    row, column = divmod(int(mask.flatten().to(torch.uint8).argmax()), mask.shape[1])
    return row, column


def check_dense(weight: Tensor) -> None:
    """Nothing, for a weight that some format may store.

    Raises: ValueError for another rank or dtype, more weights than 32-bit indices can number, or a
        weight that is not finite (its position is named).
    """
    if weight.dim() != 2:
        raise ValueError(
            f"pack needs a weight of shape [out, in], got {tuple(weight.shape)}: "
            "reshape it to two dimensions first"
        )
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"pack needs a float32, float64, bfloat16 or float16 weight, got {weight.dtype}: "
            "cast it with .to(torch.bfloat16) first"
        )
    if weight.numel() > MOST_WEIGHTS:
        raise ValueError(
            f"pack needs at most {MOST_WEIGHTS} weights in a layer, got {weight.numel()}: "
            "split the layer along its outputs"
        )
    finite = weight.isfinite()
    if not bool(finite.all()):
        row, column = first_true(~finite)
        raise ValueError(
            f"pack needs finite weights, row {row} column {column} is {weight[row, column]}: "
            "repair the checkpoint or the training run that made it"
        )


def check_quantisable(weight: Tensor, format: str) -> None:
    """Nothing, for a weight that a quantised format may store.

    Raises: ValueError where `check_dense` raises it, and for a float64 weight.
    """
    check_dense(weight)
    if weight.dtype not in QUANTISABLE:
        raise ValueError(f"pack {_narrower(weight, format)}")


def why_not_quantisable(weight: Tensor, format: str) -> str | None:
    """None, or that a quantised format cannot store this dtype."""
    return None if weight.dtype in QUANTISABLE else _narrower(weight, format)


def _narrower(weight: Tensor, format: str) -> str:
    return (
        f"into {format} needs a float32, bfloat16 or float16 weight, got {weight.dtype}: "
        "scale x code is computed in float32, cast the layer with .float() first"
    )
