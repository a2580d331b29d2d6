"""Which rows are taken from which documents: from as many as possible, some of them held out.

A row of text resembles the other rows of its document. So a few successive rows of one file are
hardly more data than one row, and a row that is held out says nothing about new text if its
document is also trained on.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from secateur.model.statistics import is_held_out

T = TypeVar("T")

# A warning is given for fewer documents: by rule of thumb, one more would change much.
FEW = 8


@dataclass(frozen=True)
class Dealt:
    """Rows in batches; for each row, in order, the number of its document, or of its first.

    `different` is the number of documents, `asked` the number of rows asked for; `what` is the
    rows' name in messages, and `remedy` says what to do about too few documents.
    """

    batches: list[Tensor] | list[dict[str, Tensor]]
    documents: tuple[int, ...]
    different: int
    asked: int
    what: str
    remedy: str

    def remarks(self, rows: str = "rows", length: str = "length") -> list[str]:
        """What is wrong with too little text, in sentences; the arguments name the options."""
        found, of = len(self.documents), self.different
        remarks = []
        if found < self.asked:
            remarks.append(
                f"{rows} {self.asked}: there are only {found} {self.what}, which are used: more "
                f"text gives more, and so does a smaller {length}"
            )
        if of < min(FEW, found):
            remarks.append(
                f"the {found} rows are of {of} document{'s' if of > 1 else ''}, and what is fitted "
                f"or measured on them may not hold for other text: {self.remedy}"
            )
        return remarks


def shuffled(count: int, generator: torch.Generator) -> list[int]:
    """The numbers below `count` in an order drawn from the generator."""
    order: list[int] = torch.randperm(count, generator=generator, device="cpu").tolist()
    return order


def in_turns(piles: Iterable[Sequence[T]]) -> Iterator[tuple[int, T]]:
    """One of each pile in turn, with the pile's number, until all are used up.

    A pile is not asked for before its first turn.
    """
    seen = list[Sequence[T]]()
    for number, pile in enumerate(piles):
        seen.append(pile)
        if pile:
            yield number, pile[0]
    for turn in range(1, max(map(len, seen), default=0)):
        for number, pile in enumerate(seen):
            if turn < len(pile):
                yield number, pile[turn]


def apart(documents: Sequence[int], rows: int) -> tuple[list[int], list[int]]:
    """The indices of `rows` rows, and of the others, without a common document if possible.

    `documents` has the document of each row. Whole documents are taken as long as they fit; what is
    still missing comes from one document, which is then the only one on both sides.
    """
    counts = Counter(documents)
    chosen, missing = set[int](), rows
    for document, count in counts.items():
        if count <= missing:
            chosen.add(document)
            missing -= count
    split = next((document for document in counts if document not in chosen), None)
    taken = [i for i, document in enumerate(documents) if document in chosen]
    taken += [i for i, document in enumerate(documents) if document == split][:missing]
    others = set(range(len(documents))) - set(taken)
    return sorted(taken), sorted(others)


def held_apart(documents: Sequence[int], batch: int) -> list[int]:
    """An order of the rows in which held-out batches share no document with the others.

    The given order, if that is so already. With too few documents, one is on both sides.
    """
    held = [is_held_out(i // batch) for i in range(len(documents))]
    sides = [
        {d for d, out in zip(documents, held, strict=True) if out is side} for side in (True, False)
    ]
    if not sides[0] & sides[1]:
        return list(range(len(documents)))
    taken, others = map(iter, apart(documents, sum(held)))
    return [next(taken) if out else next(others) for out in held]
