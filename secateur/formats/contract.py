"""What a format is, what it makes of a weight, and the checks that all of them make on a dense one.

A format is a frozen value that stores weights (`Blocks(64, 64)`, `Quantised(Int4(), NM(2, 4))`) and
knows what can multiply by them: `reference.py` says what is right, other implementations have one
file each.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.weights import DTYPES
from secateur.patterns.pattern import where_first

MOST_WEIGHTS = 2**31 - 1  # crow_indices and col_indices are int32
NO_LIMIT = 2**63 - 1  # of tokens: torch counts no more

Run = Callable[[Tensor], Tensor]


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
    """A packed weight: its format, its dense shape and dtype, and plain tensors by name.

    As `pack` makes it, these are the tensors that a checkpoint stores, one of them `values`. A
    layer may hold others in their place, which are arranged for a kernel: see `Arrangement`.
    """

    format: Format
    shape: tuple[int, int]
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def dense(self) -> Float[Tensor, "out in"]:
        """The dense weight in its dtype, rounded once to it where it is quantised."""
        return self.format.unpack(self).to(self.dtype)

    def stored(self) -> "Packed":
        """This weight as a checkpoint stores it; restored, bit for bit, from what is arranged."""
        names = self.format.tensors
        if all(name in self.tensors for name in names):
            return replace(self, tensors={name: self.tensors[name] for name in names})
        arrangements = (entry.arrangement for entry in self.format.implementations)
        restore = next(
            one.restore
            for one in arrangements
            if one is not None and one.restore and all(name in self.tensors for name in one.tensors)
        )
        return replace(self, tensors=restore(self))


@dataclass(frozen=True)
class Arrangement:
    """A weight as an implementation reads it: the names of the tensors, stored ones or others.

    `arrange(stored)` makes the others, when a weight is packed or loaded; they are never saved. Of
    one format, tensors of one name are the same, so that implementations can share them.

    `restore(arranged)` makes the stored tensors again, bit for bit. Where it is there, a layer
    holds the arrangement alone; without it what is stored, as well.
    """

    tensors: tuple[str, ...]
    arrange: Callable[[Packed], Mapping[str, Tensor]]
    restore: Callable[[Packed], Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class Gradients:
    """What is run in a backward pass where nothing dense is to be made.

    `of_input(grad, packed)` is `grad @ weight`, for `[tokens, out]`. `of_values(grad, x, packed)`
    are the numbers of `grad.T @ x` at the places of the stored `values`.
    """

    of_input: Callable[..., Tensor]
    of_values: Callable[..., Tensor]


@dataclass(frozen=True)
class Bound:
    """A linear that was laid out for some tensors: `run(x)`, for `[*tokens, in]` of up to `most`.

    It knows their addresses and holds none of them: who calls it sees to it that they are there.
    """

    run: Run
    most: int


@dataclass(frozen=True)
class Implementation:
    """One way to run a format's linear.

    `linear(x, packed, bias)` multiplies `[tokens, in]` by the packed weight, whose tensors are
    those of `arrangement`, or the stored ones without. `why_not(packed, tokens)` is the reason why
    it cannot run here, or None; it reads shape, dtype and device only.

    `activations` names the functions of `secateur.formats.activations` that `linear` applies to its
    results itself if it is called with `activation`, for less than another pass over them.
    `searches` is whether its first call for a shape searches for an algorithm, which takes minutes.
    Without `gradients` of its own those of the reference run, on the dense weight.

    `bind(packed, bias)`, where there is one, is the same linear for these very tensors, which are
    contiguous: laid out once, so that a call costs little. See `Bound`.
    """

    name: str
    linear: Callable[..., Tensor]
    why_not: Callable[..., str | None]
    arrangement: Arrangement | None = None
    activations: tuple[str, ...] = ()
    searches: bool = False
    gradients: Gradients | None = None
    bind: "Callable[[Packed, Tensor | None], Bound] | None" = None

    @property
    def restores(self) -> bool:
        """Whether what it reads is all of the weight."""
        return self.arrangement is not None and self.arrangement.restore is not None

    def reads(self, format: Format) -> tuple[str, ...]:
        """The names of the tensors that it reads."""
        return format.tensors if self.arrangement is None else self.arrangement.tensors

    def arranged(self, packed: Packed) -> Packed:
        """The stored weight as this implementation reads it."""
        made = {} if self.arrangement is None else self.arrangement.arrange(packed)
        tensors = {**packed.tensors, **made}
        return replace(packed, tensors={n: tensors[n] for n in self.reads(packed.format)})


def held_tensors(format: Format, chosen: Collection[Implementation]) -> tuple[str, ...]:
    """The names of the tensors that a layer holds in order to run these implementations.

    What they read; and all that is stored, unless it can be restored from that. The reference does
    without, then: it restores the weight at every call, as it unpacks it at every call.
    """
    restores = any(one.restores for one in chosen)
    readers = [one for one in chosen if not restores or one != format.implementations[-1]]
    stored = () if restores else format.tensors
    return tuple(dict.fromkeys((*stored, *(name for one in readers for name in one.reads(format)))))


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
