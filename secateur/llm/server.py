"""An HTTP server for one model: completions and chats, whole or streamed, as OpenAI's API has them.

Texts are written one after the other, on one thread, in the order of the requests. A request whose
client has gone is dropped, wherever it is.
"""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterator,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import nn

from secateur.core.memory import is_out_of_memory
from secateur.integrations.chat import Template
from secateur.llm.kernel_steps import steps_of
from secateur.llm.protocol import COMPLETION_TOKENS, Answer, Body, Usage, error, read_body
from secateur.llm.request import Request, Sampling, positions, request
from secateur.llm.text import Piece, TextStream, pieces
from secateur.model.outputs import device_of

GONE = 499  # what stands for an answer that nobody waits for, as in nginx's logs
OUT_OF_MEMORY = "out of memory: ask for fewer max_tokens, or give a shorter prompt"


@dataclass(frozen=True)
class Served:
    """A model with a name for clients, and what makes tokens of a text and a prompt of a chat.

    `told` gets a line about each text that was written.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    template: Template | None
    told: Callable[[str], None]


def application(served: Served) -> Starlette:
    """The server of the model, which it puts in eval mode, as an ASGI application.

    It writes a token before it returns, so that what is compiled at first use is.
    Warns about settings of the model's `generation_config` that are not applied.

    Raises: ValueError if the model does not go on with text.
    """
    served.model.eval()
    texts = _Texts(served)
    asked = request(served.model, torch.zeros(1, 1, dtype=torch.long, device="cpu"), 1)
    texts.try_out(_Prompt(asked, TextStream(served.tokenizer.decode, [0])))

    async def completions(asked: HttpRequest) -> Response:
        return await _answered(texts, asked, chat=False)

    async def chats(asked: HttpRequest) -> Response:
        return await _answered(texts, asked, chat=True)

    def models(_: HttpRequest) -> Response:
        about = {"id": served.name, "object": "model", "created": 0, "owned_by": "secateur"}
        return JSONResponse({"object": "list", "data": [about]})

    def health(_: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        texts.close()

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chats, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        exception_handlers={HTTPException: _refused, ClientDisconnect: _gone, Exception: _broken},
        lifespan=lifespan,
    )


@dataclass(frozen=True)
class _Prompt:
    """A text to write: what is asked of the loop, and what takes the tokens."""

    asked: Request
    text: TextStream


class _Texts:
    """Writes texts, one after the other."""

    def __init__(self, served: Served) -> None:
        self.served = served
        # One thread: a model's cache on a GPU, and the graphs that use it, hold one text.
        self._thread = ThreadPoolExecutor(1, "texts")
        self._closed = threading.Event()

    def close(self) -> None:
        """Break off the text that is being written, and write no other."""
        self._closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def try_out(self, prompt: _Prompt) -> None:
        """Write the text and keep nothing of it.

        Raises: ValueError if the model does not go on with text.
        """
        self._thread.submit(lambda: list(self._made(prompt))).result()

    async def write(self, prompt: _Prompt) -> AsyncGenerator[Piece, None]:
        """Yield the text in pieces, once those before it are written.

        Pieces wait for a slow client, the model does not.
        """
        loop, made = asyncio.get_running_loop(), asyncio.Queue[Piece | Exception]()
        dropped = threading.Event()

        def give(found: Piece | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(made.put_nowait, found)

        def work() -> None:
            try:
                for piece in self._pieces(prompt, dropped):
                    give(piece)
            except Exception as problem:
                give(problem)

        self._thread.submit(work)
        try:
            while True:
                found = await made.get()
                if isinstance(found, Exception):
                    raise found
                yield found
                if found.ended:
                    return
        finally:
            dropped.set()

    def _pieces(self, prompt: _Prompt, dropped: threading.Event) -> Iterator[Piece]:
        """Yield the text until it ends or is dropped, and say that it has."""
        if dropped.is_set():
            return
        begun, tokens = time.perf_counter(), 0
        for piece, about in self._made(prompt):
            tokens += piece.tokens
            broken_off = dropped.is_set() or self._closed.is_set()
            if piece.ended or broken_off:
                self.served.told(
                    f"{tokens:,} {'token' if tokens == 1 else 'tokens'} after a prompt of "
                    f"{prompt.asked.ids.shape[1]:,} in {time.perf_counter() - begun:.3g} s, "
                    f"ended: {piece.ended or 'dropped'}; steps: {about}"
                )
            yield piece
            if broken_off:
                return

    def _made(self, prompt: _Prompt) -> Iterator[tuple[Piece, str]]:
        """Yield the text in pieces, each with what made it."""
        # Only here is anything done on a GPU: another thread's call may break a graph's capture.
        steps = steps_of(self.served.model)
        asked = prompt.asked.to(device_of(self.served.model))
        for piece in pieces(steps, asked, prompt.text):
            yield piece, steps.about


async def _answered(texts: _Texts, asked: HttpRequest, *, chat: bool) -> Response:
    """The answer to a request for texts."""
    served = texts.served
    try:
        body = read_body(await asked.body())
        if body.model not in (None, served.name):
            raise HTTPException(404, f"there is no model {body.model!r} here, only {served.name!r}")
        prompts = await asyncio.to_thread(_prompts, served, body, chat)
    except ValueError as problem:
        said = str(problem).replace("max_new_tokens", "max_tokens")
        raise HTTPException(400, said) from problem
    answer = Answer(served.name, chat)
    if body.stream:
        told = body.stream_options is not None and body.stream_options.include_usage
        events = _events(texts, answer, prompts, told)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )
    return await _unless_gone(asked, _whole(texts, answer, prompts))


def _prompts(served: Served, body: Body, chat: bool) -> list[_Prompt]:
    """What is to be gone on with.

    Raises: ValueError if it makes no sense, or is too long for the model.
    """
    encode = served.tokenizer.encode
    if chat:
        if body.prompt is not None or not body.messages:
            raise ValueError("a chat needs messages and no prompt: prompts go to /v1/completions")
        if served.template is None:
            raise ValueError(
                f"{served.name} has no chat template: give /v1/completions a prompt, or add the "
                "template, chat_template.jinja, to the folder"
            )
        text = served.template([message.plain() for message in body.messages])
        given = [encode(text, add_special_tokens=False).ids]  # the template has written them
    else:
        if body.messages is not None:
            raise ValueError("a completion needs a prompt: messages go to /v1/chat/completions")
        given = [encode(p).ids if isinstance(p, str) else p for p in body.prompts]
    return [_prompt(served, body, ids, chat) for ids in given]


def _prompt(served: Served, body: Body, ids: list[int], chat: bool) -> _Prompt:
    count = body.tokens
    if count is None:
        limit = positions(served.model)
        if limit is None and chat:
            raise ValueError("max_tokens is needed: the model's config names no longest text")
        room = COMPLETION_TOKENS if limit is None else max(1, limit - len(ids))
        count = room if chat else min(COMPLETION_TOKENS, room)
    temperature = 1.0 if body.temperature is None else body.temperature
    drawn = temperature != 0
    sampling = Sampling(
        temperature, body.top_k if drawn else None, body.top_p if drawn else None, body.seed
    )
    batch = torch.tensor([ids], dtype=torch.long, device="cpu")
    asked = request(served.model, batch, count, sampling=sampling)
    return _Prompt(asked, TextStream(served.tokenizer.decode, ids, body.stops))


async def _whole(texts: _Texts, answer: Answer, prompts: Sequence[_Prompt]) -> Response:
    made, tokens = list[tuple[str, str]](), 0
    for prompt in prompts:
        try:
            async for piece in texts.write(prompt):
                tokens, ended = tokens + piece.tokens, piece.ended
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
            raise HTTPException(503, OUT_OF_MEMORY) from problem
        made.append((prompt.text.text, ended))
    return JSONResponse(answer.whole(made, Usage(_read(prompts), tokens)))


async def _events(
    texts: _Texts, answer: Answer, prompts: Sequence[_Prompt], usage: bool
) -> AsyncGenerator[str, None]:
    """Yield the events of a stream; an error is one of them, as the status has been sent."""
    tokens = 0
    for said in answer.begin():
        yield _event(said)
    try:
        for index, prompt in enumerate(prompts):
            async with contextlib.aclosing(texts.write(prompt)) as made:
                async for piece in made:
                    tokens += piece.tokens
                    if piece.text or piece.ended:
                        yield _event(answer.piece(index, piece))
    except Exception as problem:
        out = is_out_of_memory(problem)
        yield _event(error(OUT_OF_MEMORY if out else _said(problem), 503 if out else 500))
        return
    if usage:
        yield _event(answer.end(Usage(_read(prompts), tokens)))
    yield "data: [DONE]\n\n"


def _event(data: object) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _read(prompts: Sequence[_Prompt]) -> int:
    """The tokens of all prompts."""
    return sum(prompt.asked.ids.shape[1] for prompt in prompts)


async def _unless_gone(asked: HttpRequest, work: Coroutine[Any, Any, Response]) -> Response:
    """What the work returns; if the client goes away before, the work is cancelled."""

    async def gone() -> Response:
        while (await asked.receive())["type"] != "http.disconnect":
            pass
        return Response(status_code=GONE)

    tasks = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()


def _refused(_: HttpRequest, problem: Exception) -> Response:
    """The answer to a request that cannot be met."""
    assert isinstance(problem, HTTPException)
    status = problem.status_code
    return JSONResponse(error(problem.detail, status), status, problem.headers)


def _broken(_: HttpRequest, problem: Exception) -> Response:
    """The answer where something went wrong here; Starlette logs it."""
    return JSONResponse(error(_said(problem), 500), 500)


def _gone(_: HttpRequest, problem: Exception) -> Response:
    """The answer to a client that went away while it was asking."""
    return Response(status_code=GONE)


def _said(problem: Exception) -> str:
    return " ".join(str(problem).split()) or type(problem).__name__
