"""The server on loopback: answers, streams, refusals, and clients that go away."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.llm.language import POSITIONS, language_model
from tests.llm.served import Client, Gated, expected, serving

server = pytest.importorskip("secateur.llm.server", reason="needs secateur[serve]")

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
PROMPT = "w5 w9 w4"


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    def template(messages: list[dict[str, str]]) -> str:
        if messages[0]["role"] == "tool":
            raise ValueError("the model's chat template does not take this chat: no tools")
        return " ".join(f"{m['content']}" for m in messages) + " w7"

    with serving(template=template) as found:
        yield found


def test_a_completion_is_what_the_loop_makes(client: Client) -> None:
    status, found = client.ask(
        COMPLETIONS, {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    )
    assert status == 200 and found["id"].startswith("cmpl-")
    assert (found["object"], found["model"]) == ("text_completion", "tiny")
    (choice,) = found["choices"]
    assert choice == {
        "index": 0, "text": expected(PROMPT, 6), "finish_reason": "length", "logprobs": None
    }  # fmt: skip
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}


def test_a_stream_is_the_completion_in_pieces(client: Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    *pieces, usage, done = client.events(
        COMPLETIONS, body | {"stream_options": {"include_usage": True}}
    )
    choices = [piece["choices"][0] for piece in pieces]
    assert "".join(choice["text"] for choice in choices) == expected(PROMPT, 6)
    assert len(pieces) == 6, "a token each"
    assert [c["finish_reason"] for c in choices] == [None] * 5 + ["length"]
    assert len({piece["id"] for piece in pieces}) == 1
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 6
    assert done == "[DONE]"
    assert all(e["choices"] for e in client.events(COMPLETIONS, body)[:-1]), "not asked for usage"


def test_a_chat_is_the_template_gone_on_with(client: Client) -> None:
    parts = [{"type": "text", "text": "w5 "}, {"type": "text", "text": "w9"}]
    messages = [{"role": "system", "content": parts}, {"role": "user", "content": "w4"}]
    body = {"messages": messages, "max_completion_tokens": 6, "temperature": 0}
    text = expected(f"{PROMPT} w7", 6)
    status, found = client.ask(CHATS, body)
    assert status == 200 and found["object"] == "chat.completion"
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}
    first, *rest, done = client.events(CHATS, body)
    assert first["object"] == "chat.completion.chunk" and done == "[DONE]"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in rest) == text
    assert rest[-1]["choices"][0]["finish_reason"] == "length"


def test_several_prompts_and_ids(client: Client) -> None:
    body = {"max_tokens": 4, "temperature": 0}
    for prompt in ([PROMPT, "w8"], [[5, 9, 4], [8]]):
        _, found = client.ask(COMPLETIONS, body | {"prompt": prompt})
        texts = [choice["text"] for choice in found["choices"]]
        assert texts == [expected(PROMPT, 4), expected("w8", 4)]
        assert found["usage"]["completion_tokens"] == 8
    assert client.complete([5, 9, 4], max_tokens=4) == expected(PROMPT, 4)
    events = client.events(COMPLETIONS, body | {"prompt": [PROMPT, "w8"]})[:-1]
    for i, text in enumerate(texts):
        choices = [e["choices"][0] for e in events if e["choices"][0]["index"] == i]
        assert "".join(choice["text"] for choice in choices) == text
    ended = [e["choices"][0]["index"] for e in events if e["choices"][0]["finish_reason"]]
    assert ended == [0, 1]


def test_draws_are_the_library_s(client: Client) -> None:
    """By default at temperature 1, as in OpenAI's API."""
    body = {"prompt": PROMPT, "max_tokens": 9, "seed": 3}
    _, found = client.ask(COMPLETIONS, body)
    assert found["choices"][0]["text"] == expected(PROMPT, 9, temperature=1.0, seed=3)
    drawn = {"temperature": 0.7, "top_p": 0.8, "top_k": 9}
    _, found = client.ask(COMPLETIONS, body | drawn)
    assert found["choices"][0]["text"] == expected(PROMPT, 9, seed=3, **drawn)
    assert client.complete(PROMPT, top_p=0.5, top_k=2) == expected(PROMPT), "nothing is drawn"


def test_it_ends_before_a_stop(client: Client) -> None:
    text = expected(PROMPT, 6)
    stop = text.split()[2]
    for given in (stop, ["never", stop]):
        _, found = client.ask(
            COMPLETIONS, {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "stop": given}
        )
        assert found["choices"][0]["text"] == text[: text.index(stop)]
        assert found["choices"][0]["finish_reason"] == "stop"


def test_length_by_default(client: Client) -> None:
    """16 tokens of a completion, as in OpenAI's API, and all that there is room for of a chat."""
    body: dict[str, Any] = {"temperature": 0}
    _, found = client.ask(COMPLETIONS, body | {"prompt": PROMPT})
    assert found["usage"]["completion_tokens"] == 16
    _, found = client.ask(COMPLETIONS, body | {"prompt": [5] * (POSITIONS - 3)})
    assert found["usage"]["completion_tokens"] == 3
    _, found = client.ask(CHATS, body | {"messages": [{"role": "user", "content": PROMPT}]})
    assert found["usage"]["completion_tokens"] == POSITIONS - 4


def test_models_and_health(client: Client) -> None:
    status, found = client.ask("/v1/models")
    assert status == 200 and [model["id"] for model in found["data"]] == ["tiny"]
    assert client.ask("/health") == (200, {"status": "ok"})


WRONG: list[tuple[str, Any, int, str]] = [
    (COMPLETIONS, b"{not json", 400, "Invalid JSON"),
    (COMPLETIONS, b"\xff", 400, "Invalid JSON"),
    (COMPLETIONS, b"", 400, "Invalid JSON"),
    (COMPLETIONS, b"[1]", 400, "should be an object"),
    (COMPLETIONS, {"prompt": None}, 400, "a list of either, got none"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt needs a text"),
    (COMPLETIONS, {"prompt": ""}, 400, "a prompt of at least 1 token"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "a prompt of at least 1 token"),
    (COMPLETIONS, {"prompt": 5}, 400, "prompt: Input should be"),
    (COMPLETIONS, {"prompt": [48]}, 400, "ids in [0, 48), got 48"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt"),
    (COMPLETIONS, {"prompt": [2**70]}, 400, "prompt"),
    (COMPLETIONS, {"max_tokens": "5"}, 400, "max_tokens: Input should be a valid integer"),
    (COMPLETIONS, {"max_tokens": 0}, 400, "max_tokens needs to be at least 1, got 0"),
    (COMPLETIONS, {"max_tokens": 62}, 400, "64 positions, got a prompt of 3 tokens and max_tokens="
     "62: pass max_tokens=61 at most, or shorten the prompt"),
    (COMPLETIONS, {"max_tokens": 10**30}, 400, "64 positions"),
    (COMPLETIONS, {"prompt": [5] * POSITIONS}, 400, "the prompt alone has 64 tokens: shorten it"),
    (COMPLETIONS, {"temperature": "hot"}, 400, "temperature: Input should be a valid number"),
    (COMPLETIONS, {"temperature": 1e-40}, 400, "temperature needs to be 0, or 1e-05 or more"),
    (COMPLETIONS, {"top_p": 7}, 400, "top_p needs to be in (0, 1], got 7.0"),
    (COMPLETIONS, {"seed": -1}, 400, "seed needs to be in"),
    (COMPLETIONS, {"stop": 5}, 400, "stop: Input should be"),
    (COMPLETIONS, {"stop": ["a", ""]}, 400, "stop needs texts of at least 1 character"),
    (COMPLETIONS, {"n": 2}, 400, "n is not supported: leave it out"),
    (COMPLETIONS, {"logprobs": 0}, 400, "logprobs is not supported: leave it out"),
    (COMPLETIONS, {"presence_penalty": 0.5}, 400, "presence_penalty is not supported"),
    (COMPLETIONS, {"min_p": 0.1}, 400, "min_p is not supported: leave it out"),
    (COMPLETIONS, {"model": "other"}, 404, "there is no model 'other' here, only 'tiny'"),
    (COMPLETIONS, {"messages": [{"role": "user", "content": "w5"}]}, 400, "messages go to"),
    (CHATS, {}, 400, "prompts go to /v1/completions"),
    (CHATS, {"prompt": None}, 400, "a chat needs messages"),
    (CHATS, {"prompt": None, "messages": []}, 400, "a chat needs messages"),
    (CHATS, {"prompt": None, "messages": [{"role": "user"}]}, 400, "messages.0.content: Field req"),
    (CHATS, {"prompt": None, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     400, "messages.0.content"),
    (CHATS, {"prompt": None, "messages": [{"role": "tool", "content": ""}]}, 400,
     "chat template does not take this chat"),
    (CHATS, {"prompt": None, "messages": [{"role": "user", "content": "w5"}], "tools": [{}]}, 400,
     "tools is not supported"),
    ("/v1/embeddings", {}, 404, "Not Found"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "status", "said"), WRONG)
def test_a_request_that_makes_no_sense_is_refused_in_a_line(
    client: Client, path: str, body: Any, status: int, said: str, stream: bool
) -> None:
    """Before a stream begins, and the next request works."""
    if isinstance(body, bytes):
        got, found = client.ask(path, raw=body)
    else:
        given = {"prompt": PROMPT, "stream": stream} | body
        got, found = client.ask(path, {k: v for k, v in given.items() if v is not None})
    assert got == status and said in found["error"]["message"]
    assert found["error"]["type"] == "invalid_request_error"
    assert "\n" not in found["error"]["message"]
    assert client.complete(PROMPT) == expected(PROMPT)


def test_what_changes_no_text_is_ignored(client: Client) -> None:
    neutral = {
        "n": 1, "best_of": 1, "echo": False, "logprobs": None, "presence_penalty": 0.0,
        "frequency_penalty": 0, "suffix": None, "user": "me", "logit_bias": {},
    }  # fmt: skip
    assert client.complete(PROMPT, **neutral) == expected(PROMPT)


def test_without_a_template_there_is_no_chat() -> None:
    with serving() as client:
        status, found = client.ask(CHATS, {"messages": [{"role": "user", "content": "w5"}]})
        assert status == 400 and "tiny has no chat template" in found["error"]["message"]
        assert client.complete(PROMPT) == expected(PROMPT)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_dropped(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    gate, begun = threading.Semaphore(0), threading.Event()
    monkeypatch.setattr(server, "steps_of", lambda model: Gated(model, gate, begun))
    with serving() as client:
        begun.clear()  # it tries the model out
        body = {"prompt": PROMPT, "max_tokens": 50, "temperature": 0, "stream": stream}
        connection = client.send(COMPLETIONS, body)
        assert begun.wait(60)
        if stream:
            answer = connection.getresponse()
            assert answer.readline().startswith(b"data: ")
            answer.close()
        connection.close()
        # Gone while it waits its turn, if the server sees that before: else it is dropped, too.
        client.send(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 50}).close()
        body = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0}
        with contextlib.closing(client.send(COMPLETIONS, body)) as after:
            _until_gone(gate, client)
            for _ in range(4):
                gate.release()
            found = json.loads(after.getresponse().read())
        assert found["choices"][0]["text"] == expected(PROMPT)
        *dropped, done = client.told
        assert 1 <= len(dropped) <= 2
        assert all("ended: dropped" in line and int(line.split()[0]) < 50 for line in dropped)
        assert done.startswith("5 tokens after a prompt of 3") and "ended: length" in done


def _until_gone(gate: threading.Semaphore, client: Client) -> None:
    """Let single steps through until the text is dropped."""
    for _ in range(40):
        if client.told:
            return
        time.sleep(0.05)
        gate.release()
    raise AssertionError("it was written on")


def test_requests_at_once_are_written_one_after_the_other(client: Client) -> None:
    texts = dict[int, str]()

    def ask(i: int) -> None:
        texts[i] = client.complete([5 + i, 9], max_tokens=12)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {i: expected(f"w{5 + i} w9", 12) for i in range(6)}


class Failing(nn.Module):
    """The model, whose forward raises when it is told to."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.problem = model, None
        self.config, self.generation_config = model.config, model.generation_config

    def forward(
        self, input_ids: Any, use_cache: bool = True, past_key_values: Any = None,
        attention_mask: Any = None, position_ids: Any = None,
    ) -> Any:  # fmt: skip
        if self.problem is not None and past_key_values is not None:
            raise self.problem
        return self.model(
            input_ids, use_cache=use_cache, past_key_values=past_key_values,
            position_ids=position_ids,
        )  # fmt: skip


def test_what_goes_wrong_in_the_model_is_an_answer() -> None:
    model: Any = Failing(language_model())
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    with serving(model) as client:
        for problem, status, said in [
            (torch.OutOfMemoryError("CUDA out of memory"), 503, "out of memory: ask for fewer max"),
            (RuntimeError("broken\nhere"), 500, "broken here"),
        ]:
            model.problem = problem
            got, found = client.ask(COMPLETIONS, body)
            assert got == status and said in found["error"]["message"]
            assert found["error"]["type"] == "server_error"
            first, last = client.events(COMPLETIONS, body)
            assert first["choices"][0]["text"] and said in last["error"]["message"]
            model.problem = None
            assert client.complete(PROMPT) == expected(PROMPT)


def test_a_model_that_writes_no_text_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="generate needs a model that keeps keys and values"),
        contextlib.ExitStack() as stack,
    ):
        stack.enter_context(serving(nn.Linear(2, 2)))
