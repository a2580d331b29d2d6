"""`secateur generate`: text on stdout, its speed on stderr, and the chain that leads there."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.cli import generate as command
from secateur.integrations.tokens import read_tokenizer
from secateur.llm.request import request
from secateur.llm.steps import ModelSteps
from secateur.llm.text import TextStream
from tests.cli.shell import ROWS, refused, run, said, tokens

PROMPT = "w1 w2 w3"
# Drawn tokens: the most likely ones of random weights repeat themselves.
DRAWS = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "seed": 3}
DRAWN = [f"--{name.replace('_', '-')}={value}" for name, value in DRAWS.items()]


def continued(folder: Path, count: int, **options: Any) -> tuple[list[int], str]:
    """The new ids that the library makes after the prompt, and their text."""
    tokenizer, model = read_tokenizer(folder), sc.load(folder).float()
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    made = sc.generate(model, ids, max_new_tokens=count, **options)[0, 3:].tolist()
    return made, tokenizer.decode(made)


def test_text_is_on_stdout_and_figures_on_stderr(pruned: Path) -> None:
    ids, text = continued(pruned, 12)
    result = run("generate", pruned, "--prompt", PROMPT, "--tokens", 12)
    assert len(ids) == 12 and said(result) == f" {text}\n"
    ended, first, speed, layers, steps = result.stderr.splitlines()
    assert ended == "12 tokens after a prompt of 3, ended: length"
    assert first.startswith("first token after ") and first.endswith(" s")
    assert speed.endswith(" tokens/s after it")
    assert layers == "linear layers: 15 dense"
    assert steps == "steps: the model's own forward"


def test_json_has_text_and_figures(pruned: Path) -> None:
    _, text = continued(pruned, 12)
    result = run("generate", pruned, "--prompt", PROMPT, "--tokens", 12, "--json")
    found = json.loads(said(result))
    assert result.stderr == "" and found["text"] == f" {text}"
    assert (found["prompt_tokens"], found["tokens"], found["ended"]) == (3, 12, "length")
    assert found["peak_bytes"] is None and found["steps"].startswith("the model's own forward")
    assert found["first_token_seconds"] > 0 and found["tokens_per_second"] > 0
    one = json.loads(said(run("generate", pruned, "--prompt", PROMPT, "--tokens", 1, "--json")))
    result = run("generate", pruned, "--prompt", PROMPT, "--tokens", 1)
    assert result.stderr.splitlines()[0] == "1 token after a prompt of 3, ended: length"
    assert one["tokens_per_second"] is None and one["text"] == f" {text.split()[0]}"


def test_a_text_is_as_long_as_there_is_room_for(pruned: Path) -> None:
    found = json.loads(said(run("generate", pruned, "--prompt", PROMPT, "--json")))
    assert (found["tokens"], found["ended"]) == (61, "length")


def test_it_is_a_paragraph_at_most(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "TOKENS", 7)
    found = json.loads(said(run("generate", pruned, "--prompt", PROMPT, "--json")))
    assert (found["tokens"], found["ended"]) == (7, "length")


def test_draws_are_the_library_s(pruned: Path) -> None:
    _, text = continued(pruned, 12, **DRAWS)
    assert said(run("generate", pruned, "--prompt", PROMPT, "--tokens", 12, *DRAWN)) == f" {text}\n"
    assert text != continued(pruned, 12)[1]


def test_a_prompt_in_a_file_is_read_as_it_is(pruned: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(f"{PROMPT}\n")
    expected = said(run("generate", pruned, "--prompt", PROMPT, "--tokens", 4))
    assert said(run("generate", pruned, "--prompt-file", file, "--tokens", 4)) == expected
    file.write_bytes(b"\xff\xfe")
    line = refused(run("generate", pruned, "--prompt-file", file))
    assert f"{file} cannot be read as text in UTF-8" in line


def test_it_ends_before_a_stop_text(pruned: Path) -> None:
    """Which here is of two tokens, so that the first is held back until the second comes."""
    words = continued(pruned, 12, **DRAWS)[1].split()
    at = next(i for i in range(2, 11) if words[i : i + 2] not in _pairs(words[: i + 1]))
    stop = " ".join(words[at : at + 2])
    flags = ("--prompt", PROMPT, "--tokens", 12, *DRAWN, "--stop", "never", "--stop", stop)
    result = run("generate", pruned, *flags)
    assert said(result) == f" {' '.join(words[:at])} \n"
    assert f"{at + 2} tokens after a prompt of 3, ended: stop text" in result.stderr
    found = json.loads(said(run("generate", pruned, *flags, "--json")))
    assert (found["text"], found["ended"]) == (f" {' '.join(words[:at])} ", "stop text")


def _pairs(words: list[str]) -> list[list[str]]:
    return [words[i : i + 2] for i in range(len(words) - 1)]


def test_it_ends_with_the_end_of_a_text(pruned: Path, tmp_path: Path) -> None:
    """The token that ends a text is not printed, whether its tokenizer marks it or not."""
    import shutil

    folder = tmp_path / "ending"
    shutil.copytree(pruned, folder)
    ids, text = continued(pruned, 12, **DRAWS)
    last = next(i for i in range(2, 12) if ids[i] not in ids[:i])
    (folder / "secateur.json").unlink()
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["eos_token_id"] = [1, ids[last]]
    (folder / "generation_config.json").write_text(json.dumps(settings))
    result = run("generate", folder, "--prompt", PROMPT, "--tokens", 12, *DRAWN)
    assert said(result) == f" {' '.join(text.split()[:last])}\n"
    assert f"{last + 1} tokens after a prompt of 3, ended: end of text" in result.stderr


def test_ctrl_c_ends_it_with_what_was_made(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        block, about = 1, "test"

        def __init__(self, model: nn.Module, after: int) -> None:
            self._steps, self._left = ModelSteps(model), after

        def start(self, ids: Tensor, mask: Tensor | None, length: int) -> Tensor:
            self._count()
            return self._steps.start(ids, mask, length)

        def step(self, tokens: Tensor) -> Tensor:
            return self._steps.step(tokens)

        def greedy(self, tokens: Tensor, count: int) -> Tensor:
            self._count()
            return self._steps.greedy(tokens, count)

        def _count(self) -> None:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt

    words = continued(pruned, 5)[1].split()
    for after, text, told in [(5, f" {' '.join(words)}\n", 5), (0, "\n", 0)]:
        monkeypatch.setattr(
            command, "steps_of", lambda model, after=after: Interrupted(model, after)
        )
        result = run("generate", pruned, "--prompt", PROMPT, "--tokens", 12)
        assert said(result, code=130) == text
        assert f"{told} tokens after a prompt of 3, ended: interrupted" in result.stderr
        # What was held back for a stop text is given out.
        result = run("generate", pruned, "--prompt", PROMPT, "--stop", f"{words[-1]} never")
        assert said(result, code=130) == text
        result = run("generate", pruned, "--prompt", PROMPT, "--json")
        assert json.loads(said(result, code=130))["ended"] == "interrupted"


def test_memory_that_runs_out_is_one_line(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: ModelSteps, ids: Tensor, mask: Tensor | None, length: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(ModelSteps, "start", failing)
    line = refused(run("generate", pruned, "--prompt", PROMPT))
    assert line.endswith("CUDA out of memory: write fewer --tokens after a shorter prompt, or give "
                         "--device cpu")  # fmt: skip


def test_speed_is_counted_after_the_first_token() -> None:
    written = command.Written()
    assert written.per_second is None
    written.count(1, 0.5)
    assert written.per_second is None
    written.count(2, 1.5)
    written.count(2, 2.5)
    assert (written.tokens, written.first, written.per_second) == (5, 0.5, 2.0)


@pytest.mark.parametrize(("last", "shown"), [("a", "aa\n"), ("\n", "\n\n"), ("", "\n")])
def test_the_last_line_ends_once(
    last: str, shown: str, pruned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = sc.load(pruned)
    asked = request(model, torch.tensor([[5, 6]]), 2, stop_ids=())
    text = TextStream(lambda ids: last * len(ids), [5, 6])
    command._write(ModelSteps(model), asked, text, shown=True)
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("obeyed", [True, False])
def test_a_terminal_is_not_moved_by_what_a_model_writes(
    obeyed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: obeyed)
    command._show("a\x1b[2J\n\tb\r", True)
    expected = "a\\x1b[2J\n\tb\\r" if obeyed else "a\x1b[2J\n\tb\r"
    assert capsys.readouterr().out == expected


@pytest.mark.usefixtures("no_cpu_kernels")
def test_from_dense_weights_to_text_by_commands(dense: Path, tmp_path: Path) -> None:
    """prune, recover, export, generate: each folder is one that the next command reads."""
    data = ("--tokens", tokens(dense, "calibration"), "--rows", ROWS, "--batch", 4)
    zeros, better, packed = (tmp_path / name for name in ("zeros", "better", "packed"))
    said(run("prune", dense, "-o", zeros, "-p", "2:4", "-m", "wanda", *data))
    said(run("recover", zeros, "--teacher", dense, "-o", better, *data, "--steps", 3))
    said(run("export", better, "--to", "packed", "--format", "semi24_int4", "-o", packed))
    for folder in (zeros, better, packed):
        _, text = continued(folder, 8)
        assert said(run("generate", folder, "--prompt", PROMPT, "--tokens", 8)) == f" {text}\n"
    float32 = ("--dtype", "float32", "--device", "cpu")
    assert said(run("generate", packed, "--prompt", PROMPT, "--tokens", 8, *float32)) == (
        f" {text}\n"
    )
    found = json.loads(said(run("generate", packed, "--prompt", PROMPT, "--device=cpu", "--json")))
    assert found["layers"] == {"semi24_int4 by reference": 14, "dense": 1}


def test_what_generate_refuses(pruned: Path, encoder: Path, tmp_path: Path) -> None:
    prompt = ("--prompt", PROMPT)
    for arguments, line in [
        ((), "either --prompt TEXT or --prompt-file FILE is needed, got neither"),
        ((*prompt, "--prompt-file", "x"), "FILE is needed, got both"),
        (("--prompt", ""), "needs a prompt of at least 1 token"),
        (("--prompt-file", tmp_path / "no.txt"), "no.txt does not exist"),
        ((*prompt, "--stop", ""), "--stop needs a text of at least 1 character"),
        ((*prompt, "--tokens", 62), "64 positions, got a prompt of 3 tokens and --tokens 62: give "
         "--tokens 61 at most"),
        (("--prompt", "w " * 64), "the model has 64 positions, the prompt alone has 64 tokens"),
        ((*prompt, "--top-k", 4), "--top-k and --top-p are for draws, got 4 and None with tempera"
         "ture 0, which draws nothing: give --temperature 1.0 too"),
        ((*prompt, "--temperature", -1), "--temperature needs to be 0, or 1e-05 or more, got -1.0"),
        ((*prompt, "--temperature", 1, "--top-p", 0), "--top-p needs to be in (0, 1], got 0.0"),
        ((*prompt, "--temperature", 1, "--top-k", 0), "--top-k needs to be at least 1, got 0"),
        ((*prompt, "--dtype", "int8"), "--dtype needs to be one of"),
    ]:  # fmt: skip
        assert line in refused(run("generate", pruned, *arguments))
    assert "there is no folder" in refused(run("generate", tmp_path / "no", *prompt))
    line = refused(run("generate", encoder, *prompt))
    assert f"{encoder} has no tokenizer.json: copy the one that the model was trained with" in line
    (encoder / "tokenizer.json").write_bytes((pruned / "tokenizer.json").read_bytes())
    try:
        line = refused(run("generate", encoder, *prompt))
    finally:
        (encoder / "tokenizer.json").unlink()
    assert "needs a model that keeps keys and values of past tokens, BertModel does not" in line
