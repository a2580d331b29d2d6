"""FakeStructuredSparsity: a parametrization that shows a parameter without some of its channels."""

from dataclasses import dataclass

from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from secateur.compat.torchao.shipped import ShippedFakeStructuredSparsity


class FakeStructuredSparsity(ShippedFakeStructuredSparsity):
    """A parameter without some of its channels: slices of one dimension show as 0.

    The mask has a bool for each slice, True = keep. It is not part of the model's state: take it
    from the sparsifier's `state_dict()`.

    Raises:
        ValueError: at the forward, if the mask does not have as many elements.
    """

    mask: Tensor

    def __init__(self, mask: Bool[Tensor, " channels"], dim: int = 0) -> None:
        nn.Module.__init__(self)
        self.register_buffer("mask", mask, persistent=False)
        self.dim = dim

    def forward(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        if self.mask.shape != (x.shape[self.dim],):
            raise ValueError(
                f"FakeStructuredSparsity needs a mask for the {x.shape[self.dim]} channels in "
                f"dimension {self.dim}, got the shape {tuple(self.mask.shape)}"
            )
        shape = [1] * x.dim()
        shape[self.dim] = -1
        return x.masked_fill(~self.mask.view(shape), 0)


@dataclass(frozen=True)
class Masked:
    """A parameter whose channels are masked, in one of its dimensions."""

    name: str
    dim: int
    module: nn.Module
    tensor_name: str
