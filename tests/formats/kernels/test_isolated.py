"""A child process: what ends it ends nothing else, and is known by name."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from secateur.formats.kernels import isolated
from secateur.formats.kernels.isolated import Child, ChildEnded, NoChild, in_flight, left_over

MODULE = "tests.formats.kernels.plain_child"
PATIENCE = 60.0  # seconds; only what fails takes so long
ROOT = Path(__file__).parents[3]

Start = Callable[..., Child]


@pytest.fixture
def start() -> Iterator[Start]:
    children: list[Child] = []

    def starting(*words: str, **environment: str) -> Child:
        children.append(Child(MODULE, words, environment))
        return children[-1]

    yield starting
    for child in children:
        child.end()


def ask(
    child: Child, folder: Path, *acts: tuple[str | None, str], seconds: float = PATIENCE
) -> list[dict[str, Any]]:
    return list(child.ask({"acts": acts}, "a title", folder, seconds))


def runs(pid: int) -> bool:
    """Whether the process is there, and not only as an entry that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(pid: int) -> bool:
    for _ in range(int(PATIENCE / 0.05)):
        if not runs(pid):
            return True
        time.sleep(0.05)
    return False


def test_requests_are_answered_by_another_process(start: Start, tmp_path: Path) -> None:
    child = start("some", "words", A_VARIABLE="set")
    assert child.ready["words"] == ["some", "words"] and child.ready["variable"] == "set"
    assert child.ready["pid"] != os.getpid() and child.alive
    assert os.getpgid(child.ready["pid"]) != os.getpgid(0)  # whom an interrupt reaches
    for attempt in ("first", "second"):
        assert ask(child, tmp_path, (attempt, ""), ("more", "")) == [
            {"tried": attempt},
            {"tried": "more"},
        ]
    assert list(tmp_path.iterdir()) == []
    child.end()
    assert not child.alive and not runs(child.ready["pid"])


def test_an_attempt_is_in_the_journal_before_it_begins_and_not_after(
    start: Start, tmp_path: Path
) -> None:
    acts = [(None, "journal"), ("5,1,-1", "journal"), (None, "journal")]
    rows = ask(start(), tmp_path / "new", *acts)
    journals = [tuple(row["journal"]) for row in rows if "journal" in row]
    assert journals[1:] == [("a title", "5,1,-1"), ("a title", "")]


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV", "SIGABRT", "SIGFPE", "SIGBUS"])
def test_a_crash_names_the_signal_and_the_attempt(start: Start, tmp_path: Path, name: str) -> None:
    child = start()
    with pytest.raises(ChildEnded, match=f"^{name}$") as ended:
        ask(child, tmp_path, ("good", ""), ("bad", name))
    assert ended.value.trying == "bad" and ended.value.blamed
    assert not child.alive and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("act", "how"),
    [
        ("exit", "exit code 3, the last words"),
        ("lost", "CUDA error: an illegal instruction was encountered"),
        ("hang", "it took more than 1 s"),
        ("hang in C", "it took more than 1 s"),
    ],
)
def test_other_ends_are_known_too(start: Start, tmp_path: Path, act: str, how: str) -> None:
    child = start()
    with pytest.raises(ChildEnded) as ended:
        ask(child, tmp_path, ("bad", act), seconds=1.0 if "hang" in act else PATIENCE)
    assert (ended.value.how, ended.value.trying) == (how, "bad") and ended.value.blamed
    assert not runs(child.ready["pid"]) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP"])
def test_who_is_ended_from_outside_is_not_to_blame(start: Start, tmp_path: Path, name: str) -> None:
    with pytest.raises(ChildEnded, match=name) as ended:
        ask(start(), tmp_path, ("good", name))
    assert ended.value.trying == "good" and not ended.value.blamed


def test_nothing_is_to_blame_between_attempts(start: Start, tmp_path: Path) -> None:
    with pytest.raises(ChildEnded, match="SIGSEGV") as ended:
        ask(start(), tmp_path, ("good", ""), (None, "SIGSEGV"))
    assert ended.value.trying == "" and not ended.value.blamed


def test_what_the_child_s_own_program_raises_is_no_crash(start: Start, tmp_path: Path) -> None:
    child = start()
    with pytest.raises(ChildEnded, match="^OSError: No space left on device$") as ended:
        ask(child, tmp_path, ("good", "fail"))
    assert not ended.value.blamed and not child.alive


def test_what_says_that_it_goes_on_may_take_longer(start: Start, tmp_path: Path) -> None:
    rows = ask(start(), tmp_path, ("long", "alive"), seconds=1.5)
    assert rows == [{"alive": True}] * 4 + [{"tried": "long"}]


def test_an_answer_that_is_left_early_ends_the_child(start: Start, tmp_path: Path) -> None:
    """Else the next request would get the rest of it."""
    child = start()
    rows = child.ask({"acts": [("a", ""), ("b", "")]}, "a title", tmp_path, PATIENCE)
    assert next(rows) == {"tried": "a"}
    rows.close()
    assert not child.alive and list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_the_child(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = start()

    def interrupted(deadline: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(child, "_next", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(child, tmp_path, ("slow", "hang"))
    assert not runs(child.ready["pid"]) and list(tmp_path.iterdir()) == []


def test_a_child_that_nobody_asks_ends(start: Start, tmp_path: Path) -> None:
    child = start("brief")
    assert ends(child.ready["pid"])
    with pytest.raises(ChildEnded) as ended:
        ask(child, tmp_path, ("late", ""))
    assert ended.value.trying == "" and not ended.value.blamed


# ---- no child -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("sys.frozen", True), "a frozen program has no Python"),
        (("sys.executable", ""), "does not know its own program"),
        (("sys.executable", "/nowhere/python"), "no process could be started: .*No such file"),
    ],
)
def test_why_none_can_be_started(
    start: Start, monkeypatch: pytest.MonkeyPatch, change: tuple[str, object], reason: str
) -> None:
    name, value = change
    monkeypatch.setattr(sys, name.removeprefix("sys."), value, raising=False)
    with pytest.raises(NoChild, match=reason):
        start()


def test_a_child_that_does_not_get_ready(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoChild, match="^no GPU for it$"):
        start("unable")
    with pytest.raises(NoChild, match=r"not get ready: exit code 1, ModuleNotFoundError: .*absent"):
        Child("tests.formats.kernels.absent", [], {})
    monkeypatch.setattr(isolated, "READY_SECONDS", 0.5)
    with pytest.raises(NoChild, match=r"not get ready: it took more than 0\.5 s"):
        start("mute")


def test_the_child_finds_modules_where_its_parent_does(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the working folder')")
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.chdir(tmp_path)
    assert start().alive


def in_a_daemon(answers: Any, folder: str) -> None:
    child = Child(MODULE, [], {})
    answers.put(ask(child, Path(folder), ("tried", "")))
    child.end()


def test_a_daemon_has_children_too(tmp_path: Path) -> None:
    context = get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=in_a_daemon, args=(answers, str(tmp_path)), daemon=True)
    process.start()
    assert answers.get() == [{"tried": "tried"}]
    process.join()


# ---- with its parent ----------------------------------------------------------------------------

PARENT = """
import sys
from pathlib import Path
from tests.formats.kernels.plain_child import isolated
child = isolated().Child("tests.formats.kernels.plain_child", [], {})
print(child.ready["pid"], flush=True)
acts = [["first", ""], ["slow", sys.argv[2]]]
for row in child.ask({"acts": acts}, "t", Path(sys.argv[1]), float(sys.argv[3])):
    print(row, flush=True)
"""


@pytest.mark.parametrize(
    ("act", "seconds", "signal_name"),
    [("hang", 600, "SIGKILL"), ("hang", 600, "SIGTERM"), ("hang in C", 5, "SIGKILL")],
)
def test_a_child_ends_with_its_parent(
    tmp_path: Path, act: str, seconds: int, signal_name: str
) -> None:
    """And what it was trying is not to blame, unless it hung longer than it may."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), act, str(seconds)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == b"{'tried': 'first'}\n" and runs(pid)
        if act == "hang in C":
            assert parent.stdout.readline() == b"{'hangs': True}\n"
            time.sleep(0.3)  # until it does
        parent.send_signal(getattr(signal, signal_name))
    assert ends(pid)
    left = [in_flight(path) for path in tmp_path.iterdir()]
    assert left in ([], [("t", "slow")][: act == "hang in C"])


def test_a_fork_of_the_parent_keeps_no_child_alive(start: Start) -> None:
    child = start()
    pid = os.fork()
    if pid == 0:  # this process lives on; it holds all that the parent held
        os.close(1)
        time.sleep(PATIENCE)
        os._exit(0)
    try:
        assert child._process.stdin is not None
        child._process.stdin.close()  # as if the parent had ended
        assert ends(child.ready["pid"])
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


FORKING = """
import gc, os, sys, warnings
from pathlib import Path
from tests.formats.kernels.plain_child import isolated

child = isolated().Child(sys.argv[1], [], {})
pid = os.fork()
if pid == 0:
    warnings.simplefilter("error")
    unraisable = []
    sys.unraisablehook = unraisable.append
    alive = child.alive
    child.end()
    del child
    gc.collect()
    os._exit(2 if alive else bool(unraisable))
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(list(child.ask({"acts": [("after", "")]}, "a title", Path(sys.argv[2]), 60.0)))
child.end()
"""


def test_a_fork_of_the_parent_has_no_child(tmp_path: Path) -> None:
    """It ends none, waits for none, and leaves no file open that would be warned of.

    In a process that has run nothing else: what collects garbage in a fork meets all of its parent.
    """
    command = [sys.executable, "-c", FORKING, MODULE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.splitlines() == ["0", "[{'tried': 'after'}]"], done.stderr


# ---- what is left over --------------------------------------------------------------------------


def test_journals_of_the_dead_are_read_once(tmp_path: Path) -> None:
    texts = {
        "crashed": "title\n1,1,-1\n\n7,1,-1\n",
        "torn": "title\n1,1,-1\n\n7,1",
        "between": "title\n1,1,-1\n\n",
        "title": "title\n",
        "empty": "",
        "young": "title\n9,1,-1\n",
    }
    old = time.time() - 2 * isolated.LEFT_OVER_SECONDS
    for name, text in texts.items():
        path = tmp_path / f"{name}.journal"
        path.write_text(text)
        if name != "young":
            os.utime(path, (old, old))
    (tmp_path / "other.txt").write_text("title\n8,1,-1\n")
    assert left_over(tmp_path) == [("title", "7,1,-1")]
    assert left_over(tmp_path) == [] == left_over(tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "young.journal"]


def test_where_the_folder_cannot_be_written_another_is(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the folder's place")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    folder = tmp_path / "file" / "journals"
    with pytest.raises(ChildEnded) as ended:
        ask(start(), folder, ("bad", "SIGILL"))
    assert ended.value.trying == "bad"
    assert list((tmp_path / "temporary" / "journals").iterdir()) == []


def test_in_flight_of_no_journal(tmp_path: Path) -> None:
    assert in_flight(tmp_path / "absent") == ("", "")
