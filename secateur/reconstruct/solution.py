"""What a reconstruction returns."""

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor


class Solution(NamedTuple):
    """A reconstructed weight, its mask, and what a reader of the report should know about it."""

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    note: str = ""
