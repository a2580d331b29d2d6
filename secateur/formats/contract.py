"""What a format is, what it makes of a weight, and the checks that all of them make on a dense one.

A format is a frozen value that stores weights (`Blocks(64, 64)`, `Quantised(Int4(), NM(2, 4))`) and
knows what can multiply by them: `reference.py` says what is right, other implementations have one
file each.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.weights import DTYPES
from secateur.patterns.pattern import where_first

MOST_WEIGHTS = 2**31 - 1  # crow_indices and col_indices are int32


@runtime_checkable
class Format(Protocol):
    """How a weight is stored, and what can multiply by it; a frozen value.

    `str(format)` is its name with its options, as `parse_format` reads it. Formats of one name
    share their operators, and so their `tensors`: what they store, in the operators' order.
    """

    @property
    def name(self) -> str: ...
    @property
    def tensors(self) -> tuple[str, ...]: ...
    @property
    def implementations(self) -> tuple["Implementation", ...]:
        """In order of preference where nothing was measured; the last one is the reference."""
        ...

    @property
    def is_exact(self) -> bool:
        """Whether the dense weight comes back as it was; if not, packing rounds it to a grid."""
        ...

    @property
    def prune_to(self) -> str:
        """What to prune to for it to be faster than dense where something runs it, if anything."""
        return ""

    def __str__(self) -> str:
        return self.name

    def like(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> "Format":
        """The format of this name that has these tensors: itself, unless the name has options."""
        return self

    def why_not(self, weight: Tensor) -> str | None:
        """Why this dense weight cannot be stored so or gains nothing by it, or None."""
        ...

    def density(self, weight: Float[Tensor, "out in"]) -> float:
        """The fraction of this weight that `pack` would store values for."""
        ...

    def pack(self, weight: Tensor) -> "Packed":
        """The packed weight, whether or not it is smaller than the dense one.

        Raises: ValueError where the format cannot hold this weight.
        """
        ...

    def unpack(self, packed: "Packed") -> Float[Tensor, "out in"]:
        """The weight that the packed one stands for, exactly; in float32 where it is quantised."""
        ...

    def empty(self, shape: tuple[int, int], stored: int, dtype: torch.dtype) -> "Packed":
        """Zeros of these sizes, for a loader to fill.

        `stored` is the length of `values`.

        Raises: ValueError if the sizes do not agree.
        """
        ...

    def why_broken(self, packed: "Packed") -> str | None:
        """What keeps the tensors from being such as `pack` makes, or None."""
        ...


@dataclass(frozen=True)
class Packed:
    """A packed weight: its format, its dense shape and the plain tensors that a checkpoint stores.

    One of them is `values`.
    """

    format: Format
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def dtype(self) -> torch.dtype:
        """The dense weight's."""
        return self.tensors[typed_tensor(self.tensors)].dtype

    @property
    def device(self) -> torch.device:
        return self.tensors["values"].device

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that a checkpoint stores."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def dense(self) -> Float[Tensor, "out in"]:
        """The dense weight in its dtype, rounded once to it where it is quantised."""
        return self.format.unpack(self).to(self.dtype)


def _no_arrangement(packed: Packed) -> tuple[Tensor, ...]:
    return ()


@dataclass(frozen=True)
class Implementation:
    """One way to run a format's linear.

    `linear(x, packed, bias, *arranged)` multiplies `[tokens, in]` by the packed weight, and
    `why_not(packed, tokens)` is the reason why it cannot run here, or None. It reads shapes, dtype
    and device only. `arrange(packed)` makes the tensors named in `arrangement`, which only this
    implementation can read: they are made when a weight is packed or loaded and never saved.

    `activations` names the functions of `secateur.formats.activations` that `linear` applies to its
    results itself if it is called with `activation`, for less than another pass over them.
    """

    name: str
    linear: Callable[..., Tensor]
    why_not: Callable[..., str | None]
    arrangement: tuple[str, ...] = ()
    arrange: Callable[..., tuple[Tensor, ...]] = _no_arrangement
    activations: tuple[str, ...] = ()


def typed_tensor(names: Collection[str]) -> str:
    """Which of a format's tensors has the dense weight's dtype; casting a layer casts it alone."""
    return "scales" if "scales" in names else "values"


def why_no_weight(weight: Tensor, format: Format) -> str | None:
    """Why the format needs another weight, or None for a matrix of floating-point numbers."""
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        got = f"{tuple(weight.shape)} of {weight.dtype}"
        return f"{format} needs a 2-D floating-point weight, got {got}"
    return None


def why_not_smaller(weight: Tensor, format: Format, stored_bytes: int) -> str | None:
    """Why storing the weight in this many bytes gains nothing, or None if it does."""
    ratio = stored_bytes / max(1, weight.nbytes)
    if ratio >= 1:
        return f"{format} would store {ratio:.2f}x the bytes of the dense weight: nothing to gain"
    return None


def check_stored(format: Format, shape: tuple[int, int], stored: int) -> None:
    """Raise unless a weight of this shape has that many values.

    Raises: ValueError if more is stored than there are weights.
    """
    if stored > shape[0] * shape[1]:
        raise ValueError(
            f"{format} needs at most {shape[0] * shape[1]} values, got {stored}: "
            "the description is damaged, save the model again"
        )


def dense_shape(weight: Tensor) -> tuple[int, int]:
    """The two sizes of a weight that some format can store.

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
        row, column = where_first(~finite)
        raise ValueError(
            f"pack needs finite weights, row {row} column {column} is {weight[row, column]}: "
            "repair the checkpoint or the training run that made it"
        )
    return weight.shape[0], weight.shape[1]
