"""A server on loopback in a thread of the tests, and a client for it."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.llm.steps import ModelSteps
from tests.llm.language import BOS, END, PAD, VOCABULARY, language_model

pytest.importorskip("starlette", reason="needs secateur[serve]")
uvicorn = pytest.importorskip("uvicorn", reason="needs secateur[serve]")

WORDS = {"<pad>": PAD, "<s>": BOS, "</s>": END} | {f"w{i}": i for i in range(3, VOCABULARY)}


def tokenizer() -> Any:
    """One word a token, `w3` to `w47`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    return made


class Gated:
    """Steps that say when a text is begun, and wait for the gate before every further token."""

    block, about = 1, "gated"

    def __init__(self, model: nn.Module, gate: threading.Semaphore, begun: threading.Event) -> None:
        self._steps, self._gate, self._begun = ModelSteps(model), gate, begun

    def start(self, ids: Tensor, mask: Tensor | None, length: int) -> Tensor:
        self._begun.set()
        return self._steps.start(ids, mask, length)

    def step(self, tokens: Tensor) -> Tensor:
        assert self._gate.acquire(timeout=60)
        return self._steps.step(tokens)

    def greedy(self, tokens: Tensor, count: int) -> Tensor:
        assert self._gate.acquire(timeout=60)
        return self._steps.greedy(tokens, count)


class Client:
    """A client of the server, and what the server has told so far."""

    def __init__(self, port: int, told: list[str]) -> None:
        self.port, self.told = port, told

    def send(self, path: str, body: object = None, raw: bytes | None = None) -> Any:
        """The connection on which a request has been sent."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection.request("GET" if data is None else "POST", path, data)
        return connection

    def ask(self, path: str, body: object = None, raw: bytes | None = None) -> tuple[int, Any]:
        """The status and the JSON of the answer."""
        with closing(self.send(path, body, raw)) as connection:
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def complete(self, prompt: object, **options: Any) -> str:
        """The text of a completion of the most likely tokens."""
        status, found = self.ask(
            "/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 5, **options}
        )
        assert status == 200, found
        text: str = found["choices"][0]["text"]
        return text

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The data of all events of a stream."""
        with closing(self.send(path, body | {"stream": True})) as connection:
            answer = connection.getresponse()
            assert answer.status == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = answer.read().decode().split("\n\n")
        assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
        found = [line.removeprefix("data: ") for line in lines]
        return [event if event == "[DONE]" else json.loads(event) for event in found]


@contextmanager
def serving(model: nn.Module | None = None, template: Any = None) -> Iterator[Client]:
    """A client of a server of the model, by default a tiny Llama named `tiny`."""
    from secateur.llm.server import Served, application

    told = list[str]()
    found = language_model() if model is None else model
    app = application(Served("tiny", found, tokenizer(), template, told.append))
    place = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    try:
        yield Client(place.getsockname()[1], told)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def expected(prompt: str, count: int = 5, **options: Any) -> str:
    """The text that the library's loop makes."""
    import secateur as sc

    words = tokenizer()
    ids = torch.tensor([words.encode(prompt).ids])
    made = sc.generate(language_model(), ids, max_new_tokens=count, **options)[0]
    before, after = words.decode(ids[0].tolist()), words.decode(made.tolist())
    return str(after[len(before) :])
