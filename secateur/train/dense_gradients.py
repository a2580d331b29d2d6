"""Gradients of all weights, held ones too, kept from before these are set to zero."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from secateur.model.distributed import team
from secateur.train.weights import Weight


class DenseGradients:
    """The gradients of some weights as backwards made them, until the next step."""

    def __init__(self) -> None:
        # What an optimizer will read, and what it was with the gradients of held weights.
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(self, name: str, gradient: Shaped[Tensor, "..."], mask: Bool[Tensor, "..."]) -> None:
        """Remember a gradient that is about to be masked.

        One that has been masked already says nothing new. One that backwards add to, as in
        gradient accumulation, is added up where it was masked; another tensor is a new beginning,
        as after `zero_grad`.
        """
        found = gradient.to_dense() if gradient.is_sparse else gradient
        if not bool(found.masked_fill(mask, 0).any()):
            return
        dense = found.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        before = self._found.get(name)
        if before is not None and before[0] is gradient:
            dense += before[1].masked_fill(mask, 0)
        self._found[name] = gradient, dense

    def take(self, weights: Mapping[str, Weight]) -> dict[str, Float[Tensor, "..."]]:
        """The gradients of these weights, summed over all processes, and forgotten here.

        One that no backward made is zero.
        """
        taken = {}
        for name, weight in weights.items():
            shape, device = weight.tensor().shape, weight.tensor().device
            none = None, torch.zeros(shape, dtype=torch.float32, device=device)
            taken[name] = self._found.pop(name, none)[1]
        team().all_reduce_(taken.values())
        return taken

    def forget(self, names: Iterable[str]) -> None:
        """Begin anew for these weights."""
        for name in names:
            self._found.pop(name, None)
