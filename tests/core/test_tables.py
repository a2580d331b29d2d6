"""Printed tables: aligned, and without anything that a terminal would obey."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.core.tables import OBEYED, printable, text_table


@pytest.mark.parametrize(
    "text, shown",
    [
        ("model.layers.0", "model.layers.0"),
        ("größer, 层, 🙂 and [bold]", "größer, 层, 🙂 and [bold]"),
        ("a\x1b[2J\x1b]0;owned\x07", "a\\x1b[2J\\x1b]0;owned\\x07"),
        ("a\nerror: b\r\t\x7f\x9b", "a\\nerror: b\\r\\t\\x7f\\x9b"),
        ("a\u202eb\u2066\u200b\ufeff", "a\\u202eb\\u2066\\u200b\\ufeff"),
        ("a\u2028b\u2029", "a\\u2028b\\u2029"),
        ("a\ud800", "a\\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_spelt_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters(exclude_categories=())))
def test_nothing_is_left_that_a_terminal_would_obey(text: str) -> None:
    shown = printable(text)
    shown.encode()
    assert not [c for c in shown if unicodedata.category(c) in OBEYED]
    assert printable(shown) == shown
    assert printable(text, keep="\n").count("\n") == text.count("\n")
    if not any(unicodedata.category(c) in OBEYED for c in text):
        assert shown == text


def test_a_table_is_aligned_and_numbers_are_set_right() -> None:
    assert text_table(("layer", "out"), [("a\x1b", "8"), ("bb", "128")]) == (
        "layer  out\n-----  ---\na\\x1b    8\nbb     128"
    )
