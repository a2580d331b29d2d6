"""The laws of dealing: turns are fair, and what is held out is of documents of its own."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.integrations.deal import Dealt, apart, held_apart, in_turns
from secateur.model.statistics import is_held_out

DOCUMENTS = st.lists(st.integers(0, 12), max_size=60)


@given(st.lists(st.integers(0, 5), max_size=8))
def test_turns_are_fair_and_complete(sizes: list[int]) -> None:
    """At any moment a pile has given at most one more than another that is not used up."""
    given = Counter[int]()
    dealt = list(in_turns([[f"{i}.{j}" for j in range(size)] for i, size in enumerate(sizes)]))
    for number, piece in dealt:
        assert piece == f"{number}.{given[number]}"  # in the pile's order
        given[number] += 1
        left = [given[i] for i, size in enumerate(sizes) if given[i] < size]
        assert not left or max(given.values()) <= min(left) + 1
    assert [given[i] for i in range(len(sizes))] == sizes


def test_a_pile_is_not_asked_for_before_its_turn() -> None:
    asked = list[int]()

    def piles() -> object:
        for number in range(5):
            asked.append(number)
            yield [number, number]

    turns = in_turns(piles())  # type: ignore[arg-type]
    assert [next(turns)[0] for _ in range(3)] == [0, 1, 2] and asked == [0, 1, 2]


@given(DOCUMENTS, st.integers(0, 60))
def test_at_most_one_document_is_on_both_sides(documents: list[int], rows: int) -> None:
    rows = min(rows, len(documents))
    taken, others = apart(documents, rows)
    assert len(taken) == rows and sorted(taken + others) == list(range(len(documents)))
    assert len({documents[i] for i in taken} & {documents[i] for i in others}) <= 1


@pytest.mark.parametrize(
    ("documents", "rows", "taken"),
    [
        ([0, 1, 2, 0, 1, 2], 2, [0, 3]),  # a whole one
        ([0, 0, 0, 1, 2], 2, [3, 4]),  # those that fit
        ([0, 0, 0, 0], 1, [0]),  # there is one alone
        ([0, 1, 1, 1], 2, [0, 1]),  # a whole one, and what is missing from another
    ],
)
def test_whole_documents_are_taken_as_long_as_they_fit(
    documents: list[int], rows: int, taken: list[int]
) -> None:
    assert apart(documents, rows)[0] == taken


@given(DOCUMENTS, st.integers(1, 5))
def test_held_out_batches_share_at_most_one_document(documents: list[int], batch: int) -> None:
    order = held_apart(documents, batch)
    assert sorted(order) == list(range(len(documents)))
    sides = {True: set[int](), False: set[int]()}
    for place, index in enumerate(order):
        sides[is_held_out(place // batch)].add(documents[index])
    assert len(sides[True] & sides[False]) <= 1


def test_rows_that_are_apart_stay_as_they_are() -> None:
    assert held_apart([0, 0, 1, 1, 2, 2, 0], 2) == [0, 1, 2, 3, 4, 5, 6]
    assert held_apart(range(40), 4) == list(range(40))
    assert held_apart([0, 0, 0, 0], 4) == [0, 1, 2, 3]  # one batch, of which nothing is held out
    assert held_apart([0, 0, 0, 1, 1, 2, 0], 2) == [0, 1, 3, 4, 2, 5, 6]


def test_remarks_are_in_the_singular_for_one() -> None:
    dealt = Dealt([], (3, 3), 1, 2, "passages", "do so")
    assert dealt.remarks() == [
        "the 2 rows are of 1 document, and what is fitted or measured on them may not hold for "
        "other text: do so"
    ]
