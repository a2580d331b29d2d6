"""A format chosen by a short string: `semi24`, `block:64x64`, `semi24_int4:channel` and others."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.float64 import float64_device
from secateur.formats import (
    bitmap,
    block,
    csr,
    fp8_dynamic,
    int8_dynamic,
    semi24,
    semi24_fp8,
    semi24_fp8_dynamic,
    semi24_int4,
    semi24_int8,
    semi24_int8_dynamic,
)
from secateur.formats.contract import DTYPES, Folder, Packed

FOLDERS: dict[str, Folder] = {
    "semi24": semi24,
    "block": block,
    "bitmap": bitmap,
    "csr": csr,
    "semi24_int4": semi24_int4,
    "semi24_int8": semi24_int8,
    "semi24_fp8": semi24_fp8,
    "semi24_int8_dynamic": semi24_int8_dynamic,
    "semi24_fp8_dynamic": semi24_fp8_dynamic,
    "int8_dynamic": int8_dynamic,
    "fp8_dynamic": fp8_dynamic,
}

PER_OUTPUT = (None,)  # the options of semi24_int4:channel: no group_size, one scale an output


@dataclass(frozen=True)
class Format:
    """How a weight is stored: a format's name and its options.

    The options are the rows and columns of a `block`, and `(None,)` for `semi24_int4` with one
    scale for every output; otherwise there are none.
    """

    name: str
    options: tuple[int | None, ...] = ()

    def __str__(self) -> str:
        if self.block is not None:
            return f"{self.name}:{self.block[0]}x{self.block[1]}"
        return f"{self.name}:channel" if self.options == PER_OUTPUT else self.name

    @property
    def folder(self) -> Folder:
        """The package of the format: its operators and implementations."""
        return FOLDERS[self.name]

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of a block; None for the other formats."""
        if self.name != "block":
            return None
        rows, cols = self.options
        assert rows is not None and cols is not None
        return rows, cols

    @property
    def is_exact(self) -> bool:
        """Whether the dense weight comes back as it was; if not, packing rounds it to a grid."""
        return self.folder.dequantised is None

    @property
    def _arguments(self) -> tuple[Any, ...]:
        return self.options if self.block is None else (self.block,)

    def why_not(self, weight: Tensor) -> str | None:
        """None if this dense weight can be stored so and is smaller for it, else the reason."""
        if weight.dim() != 2 or weight.dtype not in DTYPES:
            return f"{self} needs a 2-D floating-point weight, got {_describe(weight)}"
        return self.folder.why_not(weight, *self._arguments)

    def density(self, weight: Float[Tensor, "out in"]) -> float:
        """The fraction of this weight that `pack` would store values for."""
        return self.folder.density(weight, *self._arguments)

    def pack(self, weight: Tensor) -> Packed:
        """The packed weight, whether or not it is smaller than the dense one.

        Raises: ValueError where the format cannot hold this weight.
        """
        return self.folder.pack(weight, *self._arguments)

    def empty(self, shape: tuple[int, int], stored: int, dtype: torch.dtype) -> Packed:
        """A packed weight of zeros of these sizes, for a loader to fill."""
        return self.folder.empty(shape, stored, dtype, *self._arguments)


def parse_format(text: str | Format) -> Format:
    """The format that a string names; a `Format` is returned as it is.

    Raises: ValueError for an unknown name, or options that the format does not take.
    """
    if isinstance(text, Format):
        return text
    name, colon, options = text.partition(":")
    if name not in FOLDERS:
        close = get_close_matches(name, FOLDERS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        known = ", ".join("block:64x64" if known == "block" else known for known in FOLDERS)
        raise ValueError(f"unknown format {text!r}: {hint}formats are {known}")
    if name == "block":
        return _parse_block(text, options)
    if not colon:
        return Format(name)
    if name == "semi24_int4":
        if options == "channel":
            return Format(name, PER_OUTPUT)
        raise ValueError(
            f"format {name!r} takes the option 'channel' or none, got {text!r}: write {name!r} for "
            f"a scale for every 128 inputs, '{name}:channel' for one for every output"
        )
    raise ValueError(f"format {name!r} takes no options, got {text!r}: write {name!r}")


def dequantised(packed: Packed) -> Float[Tensor, "out in"]:
    """The weight that the packed one stands for, exactly; in float32 where it is quantised."""
    folder = parse_format(packed.format).folder
    return (folder.dequantised or folder.unpack)(packed)


def weight_error(weight: Float[Tensor, "out in"], packed: Packed) -> float:
    """||weight - packed|| / ||weight||: 0 for exact formats, what rounding to a grid lost else.

    Cost: of a quantised format, two dense weights in float32.
    """
    if parse_format(packed.format).is_exact:
        return 0.0
    there = float64_device(weight.device)
    lost = dequantised(packed).sub_(weight).to(there).norm(dtype=torch.float64)
    size = weight.to(there).norm(dtype=torch.float64)
    return float(lost / size) if float(size) > 0 else 0.0


def _parse_block(text: str, options: str) -> Format:
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", options)
    if sizes is None:
        raise ValueError(
            f"format 'block' needs its rows and columns, got {text!r}: write 'block:64x64'"
        )
    return Format("block", (int(sizes[1]), int(sizes[2])))


def _describe(weight: Tensor) -> str:
    return f"{tuple(weight.shape)} of {weight.dtype}"
