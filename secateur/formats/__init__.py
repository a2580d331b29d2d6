"""How sparse weights are stored and multiplied: formats, `SparseLinear`, `pack_` and `unpack_`."""

from secateur.formats.contract import Format
from secateur.formats.convert import from_torch_sparse, to_torch_sparse
from secateur.formats.format import parse_format
from secateur.formats.linear import SparseLinear, describe, empty_from
from secateur.formats.pack import PackReport, pack_, unpack_
from secateur.formats.warmup import warmup

__all__ = [
    "Format",
    "PackReport",
    "SparseLinear",
    "describe",
    "empty_from",
    "from_torch_sparse",
    "pack_",
    "parse_format",
    "to_torch_sparse",
    "unpack_",
    "warmup",
]
