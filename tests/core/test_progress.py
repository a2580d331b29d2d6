"""Progress: bars where somebody looks on, lines in a log, nothing where it is turned off."""

import io
import sys
from pathlib import Path

import pytest

from secateur.core import progress as module
from secateur.core.progress import bar, progress, say

SOURCES = Path(__file__).parents[2] / "secateur"


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    return clock


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_log_has_a_line_every_30_seconds_and_one_for_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for item in progress(range(10), "prune", unit="layer"):
        clock.now += 12
        if item == 9:
            assert len(lines(capsys)) == 3
    assert lines(capsys) == ["prune: 100% 10/10 [02:00<00:00, 12.00s/layer]"]


def test_what_takes_less_is_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress(range(10), "prune"):
        clock.now += 2.9
    assert lines(capsys) == []


def test_a_line_has_what_is_told_and_begins_where_a_checkpoint_ended(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with bar("di\x1bstil", 20, unit="step", done=10) as shown:
        clock.now += 30
        shown.set_postfix_str("loss=2")
        shown.update(5)
    assert lines(capsys) == ["di\\x1bstil:  75% 15/20 [00:30<00:30,  6.00s/step, loss=2]"]


def test_without_a_length_the_items_are_counted(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in progress(iter("abc"), "read"):
        clock.now += 40
    assert [line.partition(" [")[0] for line in lines(capsys)] == [
        "read: 1it", "read: 2it", "read: 3it",
    ]  # fmt: skip


def test_an_error_ends_it_where_it_was(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), bar("prune", 9) as shown:
        clock.now += 31
        shown.update()
        shown.update()
        raise KeyError
    assert [line.split()[2] for line in lines(capsys)] == ["1/9", "2/9"]


def test_it_can_be_turned_off(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    for _ in progress(range(3), "prune"):
        clock.now += 40
    assert lines(capsys) == []


def test_without_stderr_there_is_nothing(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    for _ in progress(range(3), "prune"):
        clock.now += 40
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("within", [False, True])
def test_a_terminal_has_a_bar(within: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress(range(3), "pru\x1bne", within=within)) == [0, 1, 2]
    shown = sys.stderr.getvalue()
    assert "pru\\x1bne:" in shown and "0/3" in shown
    assert ("3/3" in shown.split("\r")[-1]) == (not within), "what is within another bar vanishes"


def test_a_line_is_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("about 2 min")
    assert lines(capsys) == ["about 2 min"]


def test_nothing_else_shows_progress() -> None:
    users = [path for path in SOURCES.rglob("*.py") if "tqdm import" in path.read_text("utf-8")]
    assert [path.name for path in users] == ["progress.py"]
