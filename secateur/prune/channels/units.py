"""Units: channels that go together, because an operation adds, multiplies or normalises them.

Every index of every dimension of a parameter begins as a unit of its own, a number. A tensor has a
flow: arrays of these numbers that say which of its elements belong to which unit. An array has the
tensor's number of dimensions, and size 1 along those in which it does not differ, so the flow of
a `[batch, channels, h, w]` tensor is one array of shape `[1, channels, 1, 1]`. What belongs to
several arrays goes when one of its units goes. Operations tie units together; a unit that may not
go is frozen, with a reason.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

Ids = Int[np.ndarray, "..."]
Flow = list[np.ndarray]


class Units:
    """Disjoint sets of numbers, some of them frozen."""

    def __init__(self) -> None:
        self._parent = np.zeros(0, dtype=np.int64)
        self._frozen: list[tuple[int, str]] = []
        self._normalised: list[tuple[int, str]] = []
        self._returned: list[tuple[int, str]] = []
        self.ties = 0  # so many times two units became one
        self.fixed = self.new(1)
        self.freeze(self.fixed, "it is joined to channels that no layer makes")

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return len(self._parent)

    def new(self, n: int) -> Ids:
        """Numbers of `n` units that are not tied to any."""
        ids = np.arange(len(self._parent), len(self._parent) + n)
        self._parent = np.concatenate([self._parent, ids])
        return ids

    def roots(self, ids: Ids) -> Ids:
        """For each number that of its unit, the same for all that are tied."""
        found: Ids = self._parent[ids]
        while not np.array_equal(above := self._parent[found], found):
            found = above
        return found

    def tie(self, first: Ids, *others: Ids) -> None:
        """What meets when the arrays are broadcast goes together."""
        for other in others:
            a, b = np.broadcast_arrays(self.roots(first), self.roots(other))
            for x, y in {(int(x), int(y)) for x, y in zip(a.flat, b.flat, strict=True) if x != y}:
                x, y = (int(r) for r in self.roots(np.array([x, y])))
                self._parent[max(x, y)] = min(x, y)
                self.ties += x != y

    def tie_along(self, ids: Ids, dims: Iterable[int]) -> None:
        """What differs in these dimensions alone goes together."""
        for dim in dims:
            self.tie(ids, ids.take([0], dim))

    def freeze(self, ids: Ids, reason: str) -> None:
        """These units stay."""
        self._frozen += [(int(unit), reason) for unit in np.unique(ids)]

    def normalise(self, ids: Ids, reason: str) -> None:
        """Something divides by a statistic over these units."""
        self._normalised += [(int(unit), reason) for unit in np.unique(ids)]

    def give_back(self, ids: Ids) -> None:
        """The model returns these units: fewer of them are fewer outputs."""
        self._returned += [(int(unit), "it is an output of the model") for unit in np.unique(ids)]

    def settle(self, flow: Sequence[np.ndarray], where: str) -> Flow:
        """The flow with size 1 wherever arrays do not differ any more.

        An array that is a single unit is left out and stays: without it nothing would be left.
        """
        settled = []
        for ids in flow:
            roots, narrow = self.roots(ids), ids
            for dim, size in enumerate(ids.shape):
                if size > 1 and (roots == roots.take([0], dim)).all():
                    roots, narrow = roots.take([0], dim), narrow.take([0], dim)
            if narrow.size > 1:
                settled.append(narrow)
            else:
                self.freeze(ids, f"all its channels depend on one another in {where}")
        return settled

    def frozen(self) -> dict[int, str]:
        """Unit -> why it stays."""
        return self._by_root(self._frozen)

    def normalised(self) -> dict[int, str]:
        """Unit -> what has statistics over it."""
        return self._by_root(self._normalised)

    def returned(self) -> dict[int, str]:
        """Unit -> that it is an output."""
        return self._by_root(self._returned)

    def _by_root(self, marks: list[tuple[int, str]]) -> dict[int, str]:
        if not marks:
            return {}
        ids, reasons = zip(*marks, strict=True)
        found: dict[int, str] = {}
        for root, reason in zip(self.roots(np.array(ids)).tolist(), reasons, strict=True):
            found.setdefault(root, reason)
        return found


def varying(ids: Ids) -> tuple[int, ...]:
    """The dimensions in which an array differs."""
    return tuple(dim for dim, size in enumerate(ids.shape) if size > 1)


def along(ids: Ids, ndim: int, dim: int) -> Ids:
    """A list of numbers as an array that differs in one of `ndim` dimensions."""
    shape = [1] * ndim
    shape[dim] = -1
    return ids.reshape(shape)


def reshape(ids: Ids, old: Sequence[int], new: Sequence[int]) -> Ids:
    """The array of a tensor of shape `old` that is viewed as `new`.

    Dimensions of which the product stays the same are handled by themselves, so that an array is
    as small after the view as it was before.
    """
    expanded: list[int] = []
    target: list[int] = []
    for ins, outs in _blocks(old, new):
        touched = any(ids.shape[dim] > 1 for dim in ins)
        expanded += [old[dim] if touched else 1 for dim in ins]
        target += [new[dim] if touched else 1 for dim in outs]
    return np.broadcast_to(ids, expanded).reshape(target)


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """The finest cut of two shapes into runs of dimensions with equal products."""
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        left = right = 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        blocks.append((range(start_i, i), range(start_j, j)))
    return blocks
