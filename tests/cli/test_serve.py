"""`secateur serve`: a folder behind HTTP, from the shell."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.shell import refused, run, said

pytest.importorskip("uvicorn", reason="needs secateur[serve]")
pytest.importorskip("starlette", reason="needs secateur[serve]")

PROMPT = "w1 w2 w3"


@contextmanager
def serving(folder: Path) -> Iterator[tuple[int, Any]]:
    """The port of a server of the folder in a process of its own, and the process."""
    command = [sys.executable, "-c", "from secateur.cli import app; app()"]
    process = subprocess.Popen(
        [*command, "serve", str(folder), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"serving {folder.name} at http://127.0.0.1:"), process.communicate()
        assert line.endswith("/v1, until Ctrl-C\n")
        yield int(line.split(":")[2].partition("/")[0]), process
    finally:
        process.kill()
        process.communicate()


def ask(port: int, path: str, body: object = None) -> str:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, data)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        return answer.read().decode()


@pytest.fixture(scope="module")
def packed(pruned: Path) -> Path:
    folder = pruned.with_name("served-packed")
    said(run("export", pruned, "--to", "packed", "-o", folder))
    return folder


@pytest.mark.usefixtures("no_cpu_kernels")
@pytest.mark.parametrize("form", ["pruned", "packed"])
def test_a_folder_answers_as_generate_does(form: str, request: pytest.FixtureRequest) -> None:
    """Whole and streamed, and Ctrl-C ends it."""
    folder = request.getfixturevalue(form)
    result = run("generate", folder, "--prompt", PROMPT, "--tokens", 9, "--json")
    text = json.loads(said(result))["text"]
    body = {"model": folder.name, "prompt": PROMPT, "max_tokens": 9, "temperature": 0}
    with serving(folder) as (port, process):
        models = json.loads(ask(port, "/v1/models"))["data"]
        assert [model["id"] for model in models] == [folder.name]
        found = json.loads(ask(port, "/v1/completions", body))
        assert found["choices"][0]["text"] == text
        events = ask(port, "/v1/completions", body | {"stream": True}).split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        pieces = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == text
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0 and stdout == ""
    layers, first, second = stderr.splitlines()
    kinds = {"pruned": "15 dense", "packed": "14 semi24 by reference, 1 dense"}
    assert layers == f"linear layers: {kinds[form]}"
    for line in (first, second):
        assert line.startswith("9 tokens after a prompt of 3 in ")
        assert line.endswith(" s, ended: length; steps: the model's own forward")


def test_a_chat_by_the_folder_s_template(pruned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(pruned, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }} {% endfor %}w3"
    )
    result = run("generate", pruned, "--prompt", PROMPT, "--tokens", 5, "--json")
    messages = [{"role": "user", "content": "w1"}, {"role": "user", "content": "w2"}]
    body = {"messages": messages, "max_tokens": 5, "temperature": 0}
    with serving(folder) as (port, _):
        found = json.loads(ask(port, "/v1/chat/completions", body))
    assert found["choices"][0]["message"]["content"] == json.loads(said(result))["text"]


def test_settings_that_are_not_applied_are_said_once(pruned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "settings"
    shutil.copytree(pruned, folder)
    (folder / "secateur.json").unlink()
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.3}))
    with serving(folder) as (port, process):
        for _ in range(2):
            ask(port, "/v1/completions", {"prompt": PROMPT})
        process.send_signal(signal.SIGINT)
        lines = process.communicate(timeout=60)[1].splitlines()
    (warned,) = [line for line in lines if line.startswith("warning: ")]
    assert "generate does not apply repetition_penalty=1.3" in warned and len(lines) == 4


def test_a_port_in_use_is_a_line(pruned: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        line = refused(run("serve", pruned, "--port", port))
    assert f"cannot listen at 127.0.0.1 port {port}: Address already in use" in line
    assert "or another port with --port; 0 takes a free one" in line
    line = refused(run("serve", pruned, "--host", "203.0.113.7"))
    assert "cannot listen at 203.0.113.7 port 8000: " in line
    line = refused(run("serve", pruned, "--host", "no.such.invalid"))
    assert "name an address of this machine with --host" in line


@pytest.mark.parametrize("missing", ["uvicorn", "starlette"])
def test_without_the_extra_it_says_what_to_install(
    pruned: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "secateur.llm.server", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    line = refused(run("serve", pruned))
    assert f"serving needs {missing}, not installed: pip install 'secateur[serve]'" in line


def test_what_cannot_be_served_is_a_line(pruned: Path, encoder: Path, tmp_path: Path) -> None:
    assert "there is no folder" in refused(run("serve", tmp_path / "nowhere"))
    assert "no config.json" in refused(run("serve", tmp_path))
    assert "has no tokenizer.json" in refused(run("serve", encoder))
    folder = tmp_path / "encoder"
    shutil.copytree(encoder, folder)
    shutil.copy(pruned / "tokenizer.json", folder)
    assert "keeps keys and values of past tokens" in refused(run("serve", folder))
