"""A format chosen by a short string: `semi24`, `block:64x64`, `semi24_int4:channel` and others."""

from collections.abc import Sequence
from difflib import get_close_matches

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.float64 import float64_device
from secateur.formats import block, quantised
from secateur.formats.bitmap import Bitmap, codes
from secateur.formats.contract import Format, Packed
from secateur.formats.csr import Csr
from secateur.formats.op import register
from secateur.formats.semi24 import Semi24
from secateur.formats.semi48 import Semi48

BLOCKS = block.Blocks(64, 64)  # an example of its options

# Every format that has a name, with each of its options but for the sizes of a block.
FORMATS: tuple[Format, ...] = (
    *(Semi24(), Semi48(), BLOCKS, Bitmap(), Csr()),
    *(*quantised.FORMATS, *codes.FORMATS),
)

for _format in FORMATS:  # now, so that a program exported elsewhere finds its operators
    register(_format)


def parse_format(text: str | Format, others: Sequence[Format] = ()) -> Format:
    """The format that a string names; a `Format` is returned as it is.

    `others` are formats of yours, which go by `str(format)`.

    Raises: ValueError for an unknown name, or options that the format does not take.
    """
    if not isinstance(text, str):
        return text
    named = {str(format): format for format in (*FORMATS, *others)}
    if text in named:
        return named[text]
    if (found := block.parse(text)) is not None:
        return found
    raise ValueError(_unknown(text, list(named)))


def dequantised(packed: Packed) -> Float[Tensor, "out in"]:
    """The weight that the packed one stands for, exactly; in float32 where it is quantised."""
    return packed.format.unpack(packed)


def weight_error(weight: Float[Tensor, "out in"], packed: Packed) -> float:
    """||weight - packed|| / ||weight||: 0 for exact formats, what rounding to a grid lost else.

    Cost: of a quantised format, two dense weights in float32.
    """
    if packed.format.is_exact:
        return 0.0
    there = float64_device(weight.device)
    lost = packed.format.unpack(packed).sub_(weight).to(there).norm(dtype=torch.float64)
    size = weight.to(there).norm(dtype=torch.float64)
    return float(lost / size) if float(size) > 0 else 0.0


def _unknown(text: str, known: Sequence[str]) -> str:
    """What to say of a string that names no format: its options are wrong, or its name is."""
    name = text.partition(":")[0]
    same = [one for one in known if one.partition(":")[0] == name]
    if not same:
        close = get_close_matches(text, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown format {text!r}: {hint}formats are {', '.join(known)}"
    options = [one.partition(":")[2] for one in same if ":" in one]
    takes = f"the option {' or '.join(map(repr, options))} or none" if options else "no options"
    return f"format {name!r} takes {takes}, got {text!r}: write {' or '.join(map(repr, same))}"
