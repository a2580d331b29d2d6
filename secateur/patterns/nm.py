"""N:M sparsity: at most n nonzeros in every m consecutive inputs."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from secateur.patterns.keep import keep_top
from secateur.patterns.pattern import Pattern, where_first
from secateur.patterns.unstructured import Unstructured

Remainder = Literal["error", "dense", "pad"]

# More than the rounding error of (1 - n / m) * m, which is a whole number.
ROUNDING = 1e-9

WRITTEN = r"(\d+):(\d+)(?:@(dense|pad)-remainder)?(?:@channels(\d+))?"


@dataclass(frozen=True)
class NM(Pattern):
    """At most `n` nonzeros in every `m` consecutive weights along the input dim.

    `n` weights are *kept* (NVIDIA's and most papers' notation; some tools prune n). Sparse tensor
    cores multiply 2:4. The `remainder` says what happens where `m` does not divide the width: it is
    an error by default; `"dense"` leaves the last `in % m` columns dense; `"pad"` treats them as a
    group filled up with zeros, of which at most `n` are kept, for runtimes that pad the inputs.

    `channels` is the width at which groups start again. `plan` sets it for a convolution whose
    number of input channels `m` does not divide: its matrix's columns run over the channels once
    for each position of the kernel, and no group spans two positions.
    """

    n: int
    m: int
    remainder: Remainder = "error"
    channels: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(f"NM(n, m) keeps n of m, needs 1 <= n <= m, got {self.n}:{self.m}")
        if self.remainder not in ("error", "dense", "pad"):
            raise ValueError(f"remainder must be 'error', 'dense' or 'pad', got {self.remainder!r}")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels must be at least 1, got {self.channels}")

    def __str__(self) -> str:
        remainder = "" if self.remainder == "error" else f"@{self.remainder}-remainder"
        channels = "" if self.channels is None else f"@channels{self.channels}"
        return f"{self.n}:{self.m}{remainder}{channels}"

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    @property
    def kind(self) -> str:
        return str(self).replace(f"{self.n}:", "N:", 1)

    def at(self, sparsity: float) -> "NM":
        dropped = int(sparsity * self.m + ROUNDING)
        return replace(self, n=max(1, self.m - dropped))

    def on_kernel(self, channels: int) -> "NM":
        return replace(self, channels=channels if channels % self.m else None)

    def why_not(self, shape: tuple[int, int]) -> str | None:
        name = replace(self, channels=None)
        inputs = "in_channels" if self.channels else "in_features"
        width = self._width(shape[1])
        if self.channels and shape[1] % width:
            return f"{self} needs in_features divisible by {width}, got {shape[1]}"
        if width < (least := 1 if self.remainder == "pad" else self.m):
            return f"{name} needs {inputs} of at least {least}, got {width}"
        if width % self.m and self.remainder == "error":
            return f"{name} needs {inputs} divisible by {self.m}, got {width}"
        return None

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        if reason := self.why_not((score.shape[0], score.shape[1])):
            raise ValueError(f"{reason}: choose another pattern, or remainder='dense' or 'pad'")
        width = self._width(score.shape[1])
        runs = score.unflatten(1, (-1, width))
        kept = keep_top(self._groups(runs, -torch.inf), self.n).flatten(2)[..., :width]
        mask = torch.ones_like(runs, dtype=torch.bool)
        mask[..., : kept.shape[-1]] = kept
        return mask.flatten(1)

    def largest_dropped(
        self, size: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"]
    ) -> Float[Tensor, "out in"]:
        """The largest size that the mask drops in each weight's group; 0 where it drops none."""
        runs = size.masked_fill(mask, 0).unflatten(1, (-1, self._width(size.shape[1])))
        found = self._groups(runs, 0.0).amax(-1).repeat_interleave(self.m, -1)
        largest = torch.zeros_like(runs)
        stop = min(found.shape[-1], runs.shape[-1])
        largest[..., :stop] = found[..., :stop]
        return largest.flatten(1)

    def violation(self, mask: Bool[Tensor, "out in"]) -> str | None:
        width = self._width(mask.shape[1])
        kept = self._groups(mask.unflatten(1, (-1, width)), 0.0).sum(-1)
        if not (over := kept > self.n).any():
            return None
        row, place = where_first(over.flatten(1))
        run, group = divmod(place, kept.shape[-1])
        start, end = run * width + group * self.m, (run + 1) * width
        first = f"columns {start}..{min(start + self.m, end) - 1} of row {row}"
        return (
            f"has {int(over.sum())} groups of {self.m} keeping more than {self.n}: first {first}, "
            f"keeping {int(kept[row, run, group])}"
        )

    def parts(self, shape: tuple[int, int]) -> Iterator[tuple[int, int, Pattern]]:
        width = self._width(shape[1])
        rest = width % self.m
        group, last = NM(self.n, self.m), Unstructured(0.0)
        for run in range(0, shape[1], width):
            for start in range(run, run + width - rest, self.m):
                yield start, start + self.m, group
            if rest:
                filled = NM(min(self.n, rest), rest)
                stop = run + width
                yield stop - rest, stop, filled if self.remainder == "pad" else last

    def groups(self, columns: int) -> Iterator[tuple[int, int]]:
        width = self._width(columns)
        whole = width if self.remainder == "pad" else width - width % self.m
        for run in range(0, columns, width):
            for start in range(run, run + whole, self.m):
                yield start, min(start + self.m, run + width)

    @classmethod
    def parse(cls, text: str) -> "NM | None":
        if not (found := re.fullmatch(WRITTEN, text)):
            return None
        n, m, rest, channels = found.groups()
        remainder: Remainder = "dense" if rest == "dense" else "pad" if rest == "pad" else "error"
        return cls(int(n), int(m), remainder, int(channels) if channels else None)

    def _width(self, columns: int) -> int:
        return columns if self.channels is None else self.channels

    def _groups(
        self, runs: Shaped[Tensor, "out runs width"], fill: float
    ) -> Shaped[Tensor, "out runs groups m"]:
        """Each run in groups of m; a partial group is filled up, or left out if it stays dense."""
        if rest := runs.shape[-1] % self.m:
            pad = self.remainder == "pad"
            runs = F.pad(runs, (0, self.m - rest), value=fill) if pad else runs[..., :-rest]
        groups: Tensor = runs.unflatten(-1, (-1, self.m))
        return groups
