"""Processes that calibrate together, as `torchrun` starts them, each with batches of its own."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """Processes that run the same code in step; every method must be called by all of them.

    In a team of one the methods do nothing.
    """

    size: int
    rank: int

    @contextlib.contextmanager
    def raising_together(self) -> Iterator[None]:
        """Raise in all processes if the block raises in one, so that none waits for it forever.

        Inside the block each process works alone: no method of the team may be called there.
        """
        try:
            yield
        except Exception as error:
            self.all_gather(f"{type(error).__name__}: {error}")
            raise
        for rank, reason in enumerate(self.all_gather("")):
            if reason:
                raise ValueError(f"process {rank} of {self.size} raised {reason}")

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def all_reduce_(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over the processes, bit for bit the same in all."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def broadcast_(self, rank: int, tensor: Tensor) -> None:
        """Replace the tensor by the one in the process of that rank."""
        if self.size > 1:
            same = tensor.detach().contiguous()
            dist.broadcast(same, rank)
            tensor.copy_(same)


ALONE = Team(1, 0)


def team() -> Team:
    """All processes of `torch.distributed` if it has been initialised, else this one alone."""
    if dist.is_available() and dist.is_initialized():
        return Team(dist.get_world_size(), dist.get_rank())
    return ALONE
