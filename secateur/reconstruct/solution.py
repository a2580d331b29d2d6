"""What a reconstruction returns."""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor


class Solution(NamedTuple):
    """A reconstructed weight, its mask, and a note for the reader of the report."""

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    note: str = ""
