"""Text as its tokens come: whole characters, and an end at a stop text."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from secateur.llm.generate import blocks
from secateur.llm.request import Request
from secateur.llm.steps import Steps

# Tokens of the prompt that are decoded with the first new ones: a decoder may treat what begins a
# text differently, as those that leave out its first space do.
CONTEXT = 8

# What a decoder writes for bytes that are no character, or not yet one.
INCOMPLETE = "\ufffd"

# How a text ends.
STOP_TEXT, END_OF_TEXT, LENGTH = "stop text", "end of text", "length"


@dataclass(frozen=True)
class Piece:
    """What became certain of a text with so many new tokens; `ended` says how, in the last one."""

    text: str
    tokens: int
    ended: str = ""


class TextStream:
    """The text of new tokens, given out as soon as it is certain.

    A character of several tokens is held back until it is whole, and what may be the beginning of a
    stop text until it is not one. The text ends before the stop text that is complete first; of
    several that are so at once, before the one that begins first. `text` is all that was given out.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], prompt: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        self._decode, self._stops = decode, tuple(stops)
        # From `_begin` on tokens are decoded; those before `_read` are in the text already.
        self._ids = list(prompt)
        self._begin, self._read = max(0, len(prompt) - CONTEXT), len(prompt)
        self._held = ""
        self.text, self.stopped = "", False

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is certain with these tokens; none after a stop text."""
        given = ""
        for token in tokens:
            self._ids.append(token)
            new = self._new()
            # Tokens without a text, as special ones are, are no context for those behind them.
            if new and not new.endswith(INCOMPLETE):
                given += self._given(new)
        return given

    def rest(self) -> str:
        """What was held back, now that no token follows; a stop text ends it all the same."""
        given = self._given(self._new())
        left, self._held = self._held, ""
        self.text += left
        return given + left

    def _new(self) -> str:
        """The text of tokens that is not given out or held yet."""
        before = self._decode(self._ids[self._begin : self._read])
        return self._decode(self._ids[self._begin :])[len(before) :]

    def _given(self, new: str) -> str:
        """What of the held text and the new is certain; the rest is held."""
        if self.stopped:
            return ""
        self._begin, self._read = self._read, len(self._ids)
        found = self._held + new
        ends = [(at + len(stop), at) for stop in self._stops if (at := found.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            certain = found[: min(ends)[1]]
        else:
            kept = max((_overlap(found, stop) for stop in self._stops), default=0)
            certain, self._held = found[: len(found) - kept], found[len(found) - kept :]
        self.text += certain
        return certain


def pieces(steps: Steps, asked: Request, text: TextStream) -> Iterator[Piece]:
    """Yield what one prompt goes on with, as soon as it is certain, until it ends.

    It ends at a stop text, at a token that ends a text, which is not part of it, or after the
    tokens that are asked for. Nothing is yielded twice: all pieces together are `text.text`.
    """
    left = asked.count
    for block in blocks(steps, asked):
        new: list[int] = block[0].tolist()
        left -= len(new)
        last = new[-1] in asked.stop_ids
        given = text.add(new[:-1] if last else new)
        ended = STOP_TEXT if text.stopped else END_OF_TEXT if last else "" if left else LENGTH
        yield Piece(given + (text.rest() if ended else ""), len(new), ended)
        if ended:
            return


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text with which the stop may begin."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
