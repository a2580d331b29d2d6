"""Numbers of tokens and how often they occur: what is understood, and what a day's time is."""

from fractions import Fraction

import pytest

from secateur.accelerate.tokens import MOST_TOKENS, Day, Tokens, day_of


@pytest.mark.parametrize(
    ("tokens", "day"),
    [
        ((16, 1, 16), Day((1, 16))),
        ([4], Day((4,))),
        ({2048: 1, 1: 1000}, Day((1, 2048), (1000.0, 1.0))),
        ({MOST_TOKENS: 0.5}, Day((MOST_TOKENS,), (0.5,))),
    ],
)
def test_what_is_understood(tokens: Tokens, day: Day) -> None:
    assert day_of(tokens) == day


@pytest.mark.parametrize(
    "tokens",
    [(), (0,), (1, -4), (1.5,), (True,), (MOST_TOKENS + 1,), {}, {0: 1}, {True: 1}, {1.0: 2}, 16,
     "16", None],
)  # fmt: skip
def test_what_are_no_numbers_of_tokens(tokens: Tokens, unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"needs numbers of tokens from 1 upwards, got .*: name"):
        day_of(tokens)


@pytest.mark.parametrize(
    "often", [0, -1, float("inf"), float("nan"), True, "3", None, 10**400, 1j], ids=repr
)
def test_what_is_no_frequency(often: float, unchecked: None) -> None:
    with pytest.raises(ValueError, match="needs to know how often 16 tokens occur, .*: leave out"):
        day_of({1: 1, 16: often})


def test_a_day_of_known_calls_is_their_time() -> None:
    day = Day((1, 2048), (1000.0, 1.0))
    assert day.relative((5.0, 2000.0), (10.0, 1000.0)) == Fraction(7000, 11000)
    assert day.average((5.0, 2000.0)) == pytest.approx(7000 / 1001)
    assert day.only((2048,)) == Day((2048,), (1.0,))


def test_without_frequencies_each_number_has_an_equal_share_of_the_dense_time() -> None:
    day = Day((1, 2048))
    assert day.relative((5.0, 2000.0), (10.0, 1000.0)) == (Fraction(1, 2) + 2) / 2
    assert day.average((5.0, 2000.0)) is None
    assert day.only((1,)) == Day((1,))
