"""Units: channels that go together, because an operation adds, multiplies or normalises them.

Every index of every dimension of a parameter starts as a unit of its own, a number. A tensor has a
flow: arrays of these numbers that say which unit each element belongs to. An array has as many
dimensions as the tensor, with size 1 along those in which it does not vary, so the flow of a
`[batch, channels, h, w]` tensor is one array of shape `[1, channels, 1, 1]`. An element that is in
several arrays goes when any of its units goes. Operations tie units together; a unit that cannot go
is frozen, with a reason.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

Ids = Int[np.ndarray, "..."]
Flow = list[np.ndarray]


class Units:
    """Disjoint sets of numbers, some of which are frozen."""

    def __init__(self) -> None:
        self._parent = np.zeros(0, dtype=np.int64)
        self._frozen: list[tuple[int, str]] = []
        self._normalised: list[tuple[int, str]] = []
        self._returned: list[tuple[int, str]] = []
        self.ties = 0  # how often two units became one
        self.fixed = self.new(1)
        self.freeze(self.fixed, "it is joined to channels that no layer makes")

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return len(self._parent)

    def new(self, n: int) -> Ids:
        """The numbers of `n` new units."""
        ids = np.arange(len(self._parent), len(self._parent) + n)
        self._parent = np.concatenate([self._parent, ids])
        return ids

    def roots(self, ids: Ids) -> Ids:
        """The unit of each number: numbers that are tied have the same."""
        found: Ids = self._parent[ids]
        while not np.array_equal(above := self._parent[found], found):
            found = above
        return found

    def tie(self, first: Ids, *others: Ids) -> None:
        """Tie the units that meet when the arrays are broadcast."""
        for other in others:
            a, b = np.broadcast_arrays(self.roots(first), self.roots(other))
            for x, y in {(int(x), int(y)) for x, y in zip(a.flat, b.flat, strict=True) if x != y}:
                x, y = (int(r) for r in self.roots(np.array([x, y])))
                self._parent[max(x, y)] = min(x, y)
                self.ties += x != y

    def tie_along(self, ids: Ids, dims: Iterable[int]) -> None:
        """Tie the units that differ only in these dimensions."""
        for dim in dims:
            self.tie(ids, ids.take([0], dim))

    def freeze(self, ids: Ids, reason: str) -> None:
        """Mark units that cannot go."""
        self._frozen += [(int(unit), reason) for unit in np.unique(ids)]

    def normalise(self, ids: Ids, reason: str) -> None:
        """Mark units over which something computes a statistic that it divides by."""
        self._normalised += [(int(unit), reason) for unit in np.unique(ids)]

    def give_back(self, ids: Ids) -> None:
        """Mark units that the model returns, so that it has fewer outputs if they go."""
        self._returned += [(int(unit), "it is an output of the model") for unit in np.unique(ids)]

    def settle(self, flow: Sequence[np.ndarray], where: str) -> Flow:
        """The flow with size 1 wherever its arrays no longer vary.

        An array that has become a single unit is left out and frozen: without it, nothing would be
        left.
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
        """Unit -> why it cannot go."""
        return self._by_root(self._frozen)

    def normalised(self) -> dict[int, str]:
        """Unit -> what computes a statistic over it."""
        return self._by_root(self._normalised)

    def returned(self) -> dict[int, str]:
        """Unit -> that it is an output of the model."""
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
    """The dimensions in which an array varies."""
    return tuple(dim for dim, size in enumerate(ids.shape) if size > 1)


def along(ids: Ids, ndim: int, dim: int) -> Ids:
    """A list of numbers as an array that varies in one of `ndim` dimensions."""
    shape = [1] * ndim
    shape[dim] = -1
    return ids.reshape(shape)


def reshape(ids: Ids, old: Sequence[int], new: Sequence[int]) -> Ids:
    """The array of a tensor of shape `old` after it is viewed as `new`.

    Runs of dimensions whose product stays the same are handled one by one, so that the array stays
    as small as it was.
    """
    expanded: list[int] = []
    target: list[int] = []
    for ins, outs in _blocks(old, new):
        touched = any(ids.shape[dim] > 1 for dim in ins)
        expanded += [old[dim] if touched else 1 for dim in ins]
        target += [new[dim] if touched else 1 for dim in outs]
    return np.broadcast_to(ids, expanded).reshape(target)


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """The two shapes cut into the shortest runs of dimensions with equal products."""
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
