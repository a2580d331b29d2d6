"""Which columns a packed weight keeps, for each N:M pattern of which formats store half.

The modules `two_of_four` and `four_of_eight` are such values: each stores metadata of its own.
"""

from collections.abc import Mapping
from typing import Protocol

from jaxtyping import Shaped, UInt8
from torch import Tensor

from secateur.formats import four_of_eight, two_of_four
from secateur.patterns import NM


class Positions(Protocol):
    """How the positions of half of a weight's entries are stored."""

    def metadata_of(
        self, weight: Shaped[Tensor, "out in"]
    ) -> UInt8[Tensor, "out bytes"]: ...  # raises ValueError where the weight keeps more
    def why_not(self, weight: Shaped[Tensor, "out in"], format: str) -> str | None: ...
    def gather(
        self, dense: Shaped[Tensor, "out in"], metadata: UInt8[Tensor, "out bytes"]
    ) -> Shaped[Tensor, "out half_in"]: ...
    def scatter(
        self, kept: Shaped[Tensor, "out half_in"], metadata: UInt8[Tensor, "out bytes"]
    ) -> Shaped[Tensor, "out in"]: ...
    def empty_metadata(
        self, shape: tuple[int, int], stored: int, format: str
    ) -> UInt8[Tensor, "out bytes"]: ...
    def why_broken(self, metadata: UInt8[Tensor, "out bytes"], columns: int) -> str | None: ...


POSITIONS: Mapping[NM, Positions] = {NM(2, 4): two_of_four, NM(4, 8): four_of_eight}
