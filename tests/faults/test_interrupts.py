"""An in-place verb that is interrupted has changed nothing, wherever the interrupt comes."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.core.interrupts import Signals
from secateur.core.undo import PREFIX, Undo
from tests.faults.verbs import TRIED, VERBS, Verb, differences, everything

HERE = str(Path(secateur.__file__).parent)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Python's own handler; a process that a shell started in the background has none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_at(line: int, work: Callable[[], Any]) -> tuple[int, bool]:
    """The number of lines of this library that ran, and whether the interrupt was raised."""
    lines = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(HERE):
            return None
        if event == "line":
            lines += 1
            if lines == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return lines, True
    finally:
        sys.settrace(before)
    return lines, False


def places(lines: int, name: str) -> list[int]:
    """Where to interrupt: a seeded sample, and the last lines, when everything has been changed."""
    chosen = random.Random(name)
    some = {chosen.randint(1, lines) for _ in range(TRIED)}
    return sorted(some | {lines - i for i in range(min(TRIED, lines))})


@pytest.mark.parametrize("name", VERBS)
def test_at_any_line(name: str, tmp_path: Path) -> None:
    verb = VERBS[name]
    lines, _ = run(verb, -1, tmp_path / "whole")
    left = {}
    for line in places(lines, name):
        model = verb.make()
        before = everything(model)
        folder = tmp_path / str(line)
        folder.mkdir()
        _, raised = interrupted_at(line, partial(verb.call, model, folder))
        if raised and (changed := differences(before, everything(model))):
            left[line] = changed
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert left == {}


def run(verb: Verb, line: int, folder: Path) -> tuple[int, bool]:
    model = verb.make()
    folder.mkdir()
    return interrupted_at(line, lambda: verb.call(model, folder))


@pytest.mark.parametrize("name", ["prune_ wanda", "reconstruct_ blockwise", "distil_", "pack_"])
def test_pressed_again_and_again_while_it_is_put_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another Ctrl-C and another kind of signal come during every call that undoes something."""
    verb, model = VERBS[name], VERBS[name].make()
    before = everything(model)
    restore, pressed = Undo.restore, []

    def slow(undo: Undo) -> None:
        pressed.append(1)
        signal.raise_signal(signal.SIGINT)
        restore(undo)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Undo, "restore", slow)
    monkeypatch.setattr(Undo, "tidy", lambda undo: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        verb.call(model, tmp_path)
    assert pressed and differences(before, everything(model)) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "name", ["prune_ wanda", "reconstruct_ blockwise", "distil_", "decompose_"]
)
def test_by_real_signals(name: str, tmp_path: Path) -> None:
    """In a process of its own: pytest must not see what is raised in a finaliser."""
    code = "import sys; from tests.faults.test_interrupts import pressing; pressing(*sys.argv[1:])"
    command = [sys.executable, "-c", code, name, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["left"] == {} and report["interrupted"] > 0


def pressing(name: str, folder: str) -> None:
    """Press Ctrl-C three times in a row at some moment of each of several calls, and report."""
    sys.unraisablehook = lambda _: None
    signal.signal(signal.SIGINT, _interrupt)
    verb, chosen = VERBS[name], random.Random(name)
    for warm_up in ("first", "second"):
        (Path(folder) / warm_up).mkdir()
        begin = time.perf_counter()
        verb.call(verb.make(), Path(folder) / warm_up)
        seconds = time.perf_counter() - begin
    left, interrupted = {}, 0
    for i in range(2 * TRIED):
        model, own = verb.make(), Path(folder) / str(i)
        own.mkdir()
        before = everything(model)
        delay = chosen.uniform(0, seconds)
        presser = threading.Thread(target=_press_thrice, args=[delay])
        presser.start()
        done = False
        try:
            verb.call(model, own)
            done = True
        except KeyboardInterrupt:
            interrupted += 1
        presser.join()
        for late in threading.enumerate():  # which would reach the next model while it is made
            if isinstance(late, threading.Timer):
                late.join()
        if not done and (changed := differences(before, everything(model))):
            left[delay] = changed
    print(json.dumps({"left": left, "interrupted": interrupted}))


def _press() -> None:
    signal.raise_signal(signal.SIGINT)


def _interrupt(number: int, frame: Any) -> None:
    """Raise in a verb, and nowhere else in this test."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(HERE):
            raise KeyboardInterrupt
        frame = frame.f_back


def _press_thrice(delay: float) -> None:
    time.sleep(delay)
    for _ in range(3):
        _press()
        time.sleep(0.0005)


def test_an_error_and_then_an_interrupt(tmp_path: Path) -> None:
    """The first error was no interrupt; an interrupt during the undoing is not lost."""
    model = VERBS["prune_"].make()
    before, calls = everything(model), []

    def failing(weight: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise ArithmeticError("no luck")
        return weight.abs()

    restore = Undo.restore
    try:
        Undo.restore = lambda undo: (_press(), restore(undo))[1]  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt) as raised:
            secateur.prune_(model, "2:4", failing)
    finally:
        Undo.restore = restore  # type: ignore[method-assign]
    assert isinstance(raised.value.__context__, ArithmeticError)
    assert differences(before, everything(model)) == []


def test_one_that_comes_too_late_is_heard_by_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb is done: its result is returned, and the interrupt raised a moment later."""
    model = VERBS["prune_"].make()
    release = Signals.release_at_the_end_of
    monkeypatch.setattr(
        Signals, "release_at_the_end_of", lambda held, stack: (_press(), release(held, stack))[1]
    )
    report, (reads, writes) = None, os.pipe()
    with pytest.raises(KeyboardInterrupt):
        report = secateur.prune_(model, "2:4")
        os.read(reads, 1)  # forever, if the interrupt does not end it
    os.close(reads)
    os.close(writes)
    assert report is not None
    secateur.check(model, "2:4")


def test_originals_are_in_files_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever empties the folder of temporary files meanwhile takes nothing away."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = VERBS["prune_"].make()
    before, seen = everything(model), []

    def failing(weight: torch.Tensor) -> torch.Tensor:
        for folder in tmp_path.glob(f"{PREFIX}*"):
            seen.append([path.name for path in folder.iterdir()])
            folder.rmdir()
        if seen:
            raise ArithmeticError("no luck")
        return weight.abs()

    with pytest.raises(ArithmeticError):
        secateur.prune_(model, "2:4", failing)
    assert seen == [[]]
    assert differences(before, everything(model)) == []
