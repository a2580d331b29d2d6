"""Text as its tokens come: nothing is given out too early, and in the end nothing is missing."""

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from secateur.llm.text import TextStream


@cache
def bytewise() -> Any:
    """A tokenizer whose tokens are the bytes of UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def expected(text: str, stops: list[str]) -> str:
    """The text before the stop that is complete first, of those at once the one begun first."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


def in_pieces(ids: list[int], sizes: list[int]) -> list[list[int]]:
    pieces = []
    for size in sizes:
        pieces.append(ids[:size])
        ids = ids[size:]
    return [*pieces, ids]


LETTERS = st.text("ab", min_size=1, max_size=3)


@given(
    prompt=st.text(max_size=12),
    text=st.text(max_size=20) | st.text("abé€🌱", max_size=20),
    stops=st.lists(LETTERS | st.text("€é", min_size=1, max_size=2), max_size=3),
    sizes=st.lists(st.integers(0, 4), max_size=12),
)
@example(prompt="", text="a🌱b", stops=[], sizes=[1] * 12)
@example(prompt="x", text="aab", stops=["aaa", "ab"], sizes=[1] * 12)
@example(prompt="x", text="abc", stops=["abcd", "b"], sizes=[3])
@example(prompt="x", text="aab", stops=["aab"], sizes=[1] * 3)
def test_the_pieces_are_the_text_up_to_the_first_stop(
    prompt: str, text: str, stops: list[str], sizes: list[int]
) -> None:
    tokenizer = bytewise()
    stream = TextStream(tokenizer.decode, tokenizer.encode(prompt).ids, stops)
    given_out = list[str]()
    ids = tokenizer.encode(text).ids
    for piece in in_pieces(ids, sizes):
        given_out.append(stream.add(piece))
        so_far = "".join(given_out)
        assert expected(text, stops).startswith(so_far), "never more than will be"
        assert stream.text == so_far
    given_out.append(stream.rest())
    assert "".join(given_out) == stream.text == expected(text, stops)
    assert stream.stopped == any(stop in text for stop in stops)


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    tokenizer = bytewise()
    stream = TextStream(tokenizer.decode, [], ["stop", "€!"])
    pieces = [stream.add([token]) for token in tokenizer.encode("a€b st€st").ids]
    assert pieces == ["a", "", "", "", "€b", " ", "", "", "", "", "st", "€", ""]
    assert stream.rest() == "st"


def test_bytes_that_are_no_character_are_text_at_the_end() -> None:
    tokenizer = bytewise()
    broken = tokenizer.encode("é").ids[:1]
    stream = TextStream(tokenizer.decode, [], [])
    assert [stream.add(broken), stream.add(broken), stream.rest()] == ["", "", "\ufffd\ufffd"]
    stream = TextStream(tokenizer.decode, [], [])
    a = tokenizer.encode("a").ids
    assert [stream.add(broken), stream.add(a), stream.rest()] == ["", "\ufffda", ""]


def test_of_stops_in_one_token_the_one_that_is_complete_first_ends_it() -> None:
    for stops, text in [(["abc", "b"], "xa"), (["bc", "abc"], "x"), (["y", "bcd", "ab"], "x")]:
        stream = TextStream(lambda ids: "xabcd" * len(ids), [], stops)
        assert (stream.add([0]), stream.stopped) == (text, True)


@pytest.mark.parametrize("words", [["w1", "w2"], ["w1"]])
def test_words_keep_the_space_between_prompt_and_text(words: list[str]) -> None:
    """A decoder that joins words writes no space before the first one that it is given."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(9)}, unk_token="w0"))
    prompt = [tokenizer.token_to_id(word) for word in words]
    stream = TextStream(tokenizer.decode, prompt, ["w5 w6"])
    assert [stream.add([3]), stream.add([5]), stream.add([5, 7])] == [" w3", " ", "w5 w5 w7"]
    no_text = 99
    assert [stream.add([no_text]), stream.add([no_text, 8])] == ["", " w8"]
    assert stream.add([5, 6, 8]) == " " and stream.stopped and stream.rest() == ""
    assert stream.text == " w3 w5 w5 w7 w8 "
