"""A format chosen by a short string: `semi24`, `block:64x64`, `bitmap` or `csr`."""

import re
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.formats import bitmap, block, csr, semi24
from secateur.formats.contract import DTYPES, Folder, Packed

FOLDERS: dict[str, Folder] = {"semi24": semi24, "block": block, "bitmap": bitmap, "csr": csr}


@dataclass(frozen=True)
class Format:
    """How a weight is stored: a format's name and, for blocks, their rows and columns."""

    name: str
    block: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.name if self.block is None else f"{self.name}:{self.block[0]}x{self.block[1]}"

    @property
    def folder(self) -> Folder:
        """The package of the format: its operators and implementations."""
        return FOLDERS[self.name]

    @property
    def _options(self) -> tuple[tuple[int, int], ...]:
        return () if self.block is None else (self.block,)

    def why_not(self, weight: Tensor) -> str | None:
        """None if this dense weight can be stored so and is smaller for it, else the reason."""
        if weight.dim() != 2 or weight.dtype not in DTYPES:
            return f"{self} needs a 2-D floating-point weight, got {_describe(weight)}"
        return self.folder.why_not(weight, *self._options)

    def density(self, weight: Float[Tensor, "out in"]) -> float:
        """The fraction of this weight that `pack` would store values for."""
        return self.folder.density(weight, *self._options)

    def pack(self, weight: Tensor) -> Packed:
        """The packed weight, whether or not it is smaller than the dense one.

        Raises: ValueError where the format cannot hold this weight.
        """
        return self.folder.pack(weight, *self._options)

    def empty(self, shape: tuple[int, int], stored: int, dtype: torch.dtype) -> Packed:
        """A packed weight of zeros of these sizes, for a loader to fill."""
        return self.folder.empty(shape, stored, dtype, *self._options)


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
    if name != "block":
        if colon:
            raise ValueError(f"format {name!r} takes no options, got {text!r}: write {name!r}")
        return Format(name)
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", options)
    if sizes is None:
        raise ValueError(
            f"format 'block' needs its rows and columns, got {text!r}: write 'block:64x64'"
        )
    return Format(name, (int(sizes[1]), int(sizes[2])))


def _describe(weight: Tensor) -> str:
    return f"{tuple(weight.shape)} of {weight.dtype}"
