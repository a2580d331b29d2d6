"""Errors, warnings and tables: one line each, whatever names and disks do."""

import errno
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import secateur as sc
from secateur.cli.console import table
from secateur.files.sidecar import read_sidecar
from secateur.report import write_html
from tests.cli.shell import refused, run, said, same_tensors, tokens


def test_warnings_of_the_library_are_one_line_in_words_of_the_shell(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned(*arguments: object, **options: object) -> None:
        warnings.warn("something is odd: pass overwrite=True\nor not", stacklevel=1)
        raise ValueError("enough")

    monkeypatch.setattr("secateur.cli.methods.prune_", warned)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = run("prune", dense, "-o", tmp_path / "out", "-p", "2:4")
    said(result, 2)
    assert result.stderr.splitlines() == [
        "warning: something is odd: give --overwrite or not", "error: enough",
    ]  # fmt: skip


def test_debug_shows_where_an_error_came_from(dense: Path, tmp_path: Path) -> None:
    result = run("prune", dense, "-o", tmp_path / "out", "-p", "2:3", "--debug")
    assert isinstance(result.exception, ValueError) and "divisible by 3" in str(result.exception)


def test_an_error_that_lists_every_layer_keeps_its_advice(dense: Path, tmp_path: Path) -> None:
    line = refused(run("prune", dense, "-o", tmp_path / "out", "-p", "2:3"))
    assert len(line) < 900 and "dense-remainder" in line and "(--debug shows all)" in line


def test_what_is_no_model(dense: Path, tmp_path: Path) -> None:
    assert "there is no folder nowhere" in refused(run("inspect", "nowhere"))
    assert "has no config.json" in refused(run("inspect", tmp_path))
    assert "config.json is no model" in refused(run("inspect", dense / "config.json"))
    (tmp_path / "cut.safetensors").write_bytes(b"12345678901")
    line = refused(run("inspect", tmp_path / "cut.safetensors"))
    assert "cut.safetensors is no safetensors file: " in line


@pytest.mark.parametrize("others", [5, 7, 11])
def test_a_narrow_terminal_keeps_the_names_of_rows(
    others: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Console(width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr("secateur.cli.console.console", lambda: shown)
    name = "model.language_model.layers.0.self_attn.q_proj and 3 more"
    table(("what", *"abcdefghijk"[:others]), [(name, *["12345678 us"] * others)])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["what", "a"] for line in lines)
    assert any(line.strip().startswith("model") for line in lines)


EVIL = "a\x1b[2J\x1b]0;owned\x07\n[bold red]error: x[/bold red][/]\r\u202e<b>"


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A state dict with keys that would clear a screen, forge a line, and end a markup."""
    tensors = {f"{EVIL}.{i}.weight": torch.randn(8, 8) for i in range(2)}
    tensors |= {f"{EVIL}.bad.weight": torch.randn(8, 7)}
    tensors |= {f"lm_head{EVIL}.weight": torch.randn(8, 8)}
    save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_names_from_files_are_never_obeyed(evil: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    ignore = ("--ignore", "*bad")
    verbs: list[tuple[object, ...]] = [
        ("inspect", evil),
        ("inspect", evil, "--full"),
        ("inspect", evil, "--json"),
        ("plan", evil, "-p", "2:4", *ignore, "-o", plan),
        ("plan", evil, "-p", "2:4"),
        ("prune", evil, "-p", "2:4", *ignore, "-o", out),
        ("prune", evil, "--plan", plan, "-o", tmp_path / "out2"),
        ("prune", evil, "-p", "2:4", "--layers", "nothing", "-o", tmp_path / "out3"),
        ("check", out),
        ("check", evil, "--plan", plan),
    ]
    for verb in verbs:
        result = run(*verb)
        told = result.stdout + result.stderr
        assert not isinstance(result.exception, Exception) or isinstance(
            result.exception, SystemExit
        ), verb
        assert not set(told) & set("\x1b\x07\r\u202e"), verb
        assert not any(line.startswith(("[bold red]", "error: x")) for line in told.splitlines())
    assert (
        "a\\x1b[2J\\x1b]0;owned\\x07\\n[bold red]error: x[/bold red][/]"
        in run("inspect", evil).stdout
    )
    assert read_sidecar(out).plan == sc.read_plan(plan)
    assert all("\x1b" in name for name in load_file(out / "m.safetensors"))


def test_names_in_a_report_are_text(tmp_path: Path) -> None:
    model = nn.Sequential()
    name = EVIL.replace(".", "")
    model._modules[name] = nn.Linear(8, 8)
    plan = sc.plan(model, "2:4")
    report = sc.prune_(model, plan)
    write_html(tmp_path / "r.html", title=EVIL, plan=plan, prune=[report], model=model)
    page = (tmp_path / "r.html").read_text()
    assert not set(page) & set("\x1b\x07\r\u202e") and "<b>" not in page
    assert "owned\\x07" in page and "&lt;b&gt;" in page
    for shown in (str(plan), str(report)):
        assert not set(shown) & set("\x1b\x07\r\u202e")


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize("where", ["", "secateur-undo", "ck", "out"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half(
    where: str, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch as st

    write = st.save_file

    def full(tensors: Any, path: Any, *rest: Any) -> None:
        if where in str(path):
            raise SafetensorError(FULL)
        write(tensors, path, *rest)

    monkeypatch.setattr(st, "save_file", full)
    out, kept = tmp_path / "out", tmp_path / "ck"
    line = refused(run("prune", bare, "-p", "2:4", "-o", out, "--checkpoint", kept))
    assert "No space left on device" in line and "os error" not in line
    assert not out.exists() and not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    said(run("prune", bare, "-p", "2:4", "-o", out, "--checkpoint", kept))
    assert said(run("check", out))


@pytest.mark.parametrize("verb", ["plan", "report", "sensitivity"])
def test_a_page_or_table_that_cannot_be_written_is_one_line(
    verb: str, dense: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / ("out.json" if verb == "sensitivity" else "out.html")
    calls = {
        "plan": ("plan", dense, "-p", "2:4", "-o", out),
        "report": ("report", pruned, "-o", out),
        "sensitivity": ("sensitivity", dense, "--tokens", tokens(dense, "calibration"),
                        "--rows", "1", "-p", "2:4", "--layers", "*q_proj", "-o", out),
    }  # fmt: skip
    out.write_text("before")

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert refused(run(*calls[verb])).endswith(f"{out.name}: No space left on device")
    assert out.read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {out.name}
    monkeypatch.undo()
    said(run(*calls[verb]))
    assert out.read_text() != "before"


@pytest.mark.parametrize("name", ["w.bin", "w.pt"])
def test_a_pickle_says_how_to_convert_it(
    name: str, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(load_file(bare), tmp_path / name)
    line = refused(run("inspect", tmp_path / name))
    command = re.search(r'python -c "(.*)"', line)
    assert command is not None and "a pickle may hold code, so it is never read" in line
    exec(command[1])
    assert same_tensors(load_file(tmp_path / "w.safetensors"), load_file(bare))
    assert "hf download a/b-c --local-dir b-c" in refused(run("inspect", "a/b-c"))


def test_a_gguf_file_says_what_to_take_instead(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "model.gguf"):
        line = refused(run("inspect", name))
        assert "take the folder of safetensors that it was made from" in line
