"""Which zeros are usable: a pattern turns scores into a mask, and checks any other mask."""

from secateur.patterns.block import Block
from secateur.patterns.channel import Channel
from secateur.patterns.grids import Fp8, Grid, Int2, Int3, Int4, Int8
from secateur.patterns.keep import keep_top
from secateur.patterns.nm import NM
from secateur.patterns.parse import as_pattern, parse
from secateur.patterns.pattern import Pattern, takes_any_sparsity
from secateur.patterns.unstructured import Unstructured

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Fp8",
    "Grid",
    "Int2",
    "Int3",
    "Int4",
    "Int8",
    "Pattern",
    "Unstructured",
    "as_pattern",
    "keep_top",
    "parse",
    "takes_any_sparsity",
]
