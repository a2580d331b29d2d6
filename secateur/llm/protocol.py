"""Requests and answers in the form of OpenAI's API, as far as they apply to one local model.

What is asked for and would change the text is honoured or refused; only what cannot change it is
ignored.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secateur.llm.text import LENGTH, Piece

# Fields that change no text.
IGNORED = (
    "metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user",
)  # fmt: skip

# Fields of the API that are not supported, with the values that ask for nothing.
NOT_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}

# Tokens of a completion where the request does not say, as in OpenAI's API.
COMPLETION_TOKENS = 16

Id = Annotated[int, Field(ge=0, lt=2**31)]
PLAIN = ConfigDict(strict=True, extra="forbid")


class Part(BaseModel):
    """A part of a message: text, which is all that is taken."""

    model_config = PLAIN
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = PLAIN
    role: str
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """It as chat templates take it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text}


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = PLAIN
    include_usage: bool = False


class Body(BaseModel):
    """The body of a request: of a completion with `prompt`, of a chat with `messages`."""

    model_config = PLAIN
    model: str | None = None
    prompt: str | list[str] | list[Id] | list[list[Id]] | None = None
    messages: list[Message] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, nothing in NOT_SUPPORTED.items():
            value = given.get(name)
            # A 0 is no False: it asks for log probabilities.
            same = [v for v in nothing if v == value and (v is False) == (value is False)]
            if value is not None and not same:
                raise ValueError(f"{name} is not supported: leave it out")
        left_out = (*NOT_SUPPORTED, *IGNORED)
        return {name: value for name, value in given.items() if name not in left_out}

    @property
    def tokens(self) -> int | None:
        """New tokens at most; None where nothing is said."""
        most = self.max_completion_tokens
        return self.max_tokens if most is None else most

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which it ends.

        Raises: ValueError if one has no character.
        """
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if "" in stops:
            raise ValueError("stop needs texts of at least 1 character: leave out the empty one")
        return stops

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """What is to be gone on with, each as a text or as token ids.

        Raises: ValueError if there is none.
        """
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if not given:
            raise ValueError("prompt needs a text, token ids or a list of either, got none")
        ids = [token for token in given if isinstance(token, int)]
        return [ids] if ids else [prompt for prompt in given if not isinstance(prompt, int)]


def read_body(text: bytes) -> Body:
    """The request in the body.

    Raises: ValueError if it is no JSON, or not what the API says, with the place.
    """
    try:
        return Body.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise ValueError(_line(first["loc"], first["msg"], first["type"])) from None


def _line(place: Sequence[str | int], said: str, kind: str) -> str:
    """What pydantic found, in a line."""
    # Of a value that may be one of several types the place names the type, too.
    names = [str(part) for part in place if part != "str" and not str(part).startswith("list[")]
    where = ".".join(names)
    if kind == "extra_forbidden":
        return f"{where} is not supported: leave it out"
    said = said.removeprefix("Value error, ")
    return f"{where}: {said}" if where else said


@dataclass(frozen=True)
class Usage:
    """How many tokens were read and made."""

    prompt: int
    made: int

    def plain(self) -> dict[str, int]:
        """It as plain data."""
        total = self.prompt + self.made
        return {
            "prompt_tokens": self.prompt, "completion_tokens": self.made, "total_tokens": total
        }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """The form of an answer to one request: a completion, or a message of a `chat`."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, texts: Sequence[tuple[str, str]], usage: Usage) -> dict[str, Any]:
        """The answer at once: each text with how it ended."""
        choices = [self._choice(i, text, ended) for i, (text, ended) in enumerate(texts)]
        return self._with(choices, usage, "")

    def begin(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, 0)] * self.chat

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """The part of a stream that a piece of the text number `index` is."""
        if self.chat:
            said: dict[str, Any] = {"delta": {"content": piece.text} if piece.text else {}}
        else:
            said = {"text": piece.text, "logprobs": None}
        return self._chunk(said, index, _reason(piece.ended))

    def end(self, usage: Usage) -> dict[str, Any]:
        """The part that tells how many tokens there were."""
        return self._with([], usage, ".chunk" if self.chat else "")

    def _choice(self, index: int, text: str, ended: str) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text}
        if self.chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **said, "finish_reason": _reason(ended), "logprobs": None}

    def _chunk(
        self, said: Mapping[str, Any], index: int, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **said, "finish_reason": reason}
        return self._with([choice], None, ".chunk" if self.chat else "")

    def _with(
        self, choices: list[dict[str, Any]], usage: Usage | None, part: str
    ) -> dict[str, Any]:
        kind = f"chat.completion{part}" if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}", "object": kind,
            "created": self.created, "model": self.model, "choices": choices,
            **({"usage": usage.plain()} if usage else {}),
        }  # fmt: skip


def error(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """What a client gets in place of an answer."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _reason(ended: str) -> str | None:
    """Why a text ended, in the API's words; None where it goes on."""
    if not ended:
        return None
    return "length" if ended == LENGTH else "stop"
