"""The layouts of `torchao.dtypes` that configurations take here."""

from secateur.compat.torchao.configs import (
    BlockSparseLayout,
    CutlassSemiSparseLayout,
    MarlinSparseLayout,
    PlainLayout,
    SemiSparseLayout,
)

__all__ = [
    "BlockSparseLayout",
    "CutlassSemiSparseLayout",
    "MarlinSparseLayout",
    "PlainLayout",
    "SemiSparseLayout",
]
