"""A child process for what may end the process that runs it: then it ends that child alone.

An illegal instruction in a library's kernel costs a process its CUDA context and all that it holds
on the GPU, and a crash in its host code costs the process itself. So what was never run here before
runs in a child, which has a context of its own. The child is a fresh Python, not a fork, and not
multiprocessing's: that would import the user's program again, and a daemon could not start one.

Requests and answers are JSON, one object a line. Before the child tries something it writes that
into a journal, a file that is on the disk before the attempt begins: what is left in the journal of
a child that ended is what ended it.
"""

import faulthandler
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

READY_SECONDS = 180.0  # torch from a cold disk and a CUDA context; some 6 where it is warm
IDLE_SECONDS = 30.0  # without a request, after which a child ends and its GPU memory is free
END_SECONDS = 5.0  # that a child has to end once it is asked to
# A journal so old has no process: an attempt that takes longer than a minute or so is ended.
LEFT_OVER_SECONDS = 600.0
# Signals by which others end a process, a system without memory included: no crash of its own.
FROM_OUTSIDE = tuple(
    getattr(signal, name)
    for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGXCPU")
    if hasattr(signal, name)
)

Row = dict[str, Any]


class NoChild(RuntimeError):
    """No child can be started here; the message says why."""


class ChildEnded(RuntimeError):
    """The child ended before it had answered: how, and what it was trying by its journal.

    `blamed` is False where it was ended from outside, or was trying nothing.
    """

    def __init__(self, how: str, trying: str, from_outside: bool) -> None:
        super().__init__(how)
        self.how, self.trying = how, trying
        self.blamed = bool(trying) and not from_outside


# ---- the parent's side ---------------------------------------------------------------------------


class Child:
    """A running child; `ready` is what it said once it was. Ends with its parent, and when idle.

    One thread at a time may ask it.
    """

    def __init__(self, module: str, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a Python that calls `module.main(*words)`, which has to call `serve`.

        Raises: NoChild if it does not start, or is not ready in time.
        """
        start = [*command(module), *words]
        self.owner = os.getpid()
        try:
            self._errors = tempfile.TemporaryFile()  # a pipe that nobody reads would fill
        except OSError as error:
            raise NoChild(f"no temporary file can be written: {error}") from error
        try:
            self._process = subprocess.Popen(
                start,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(_import_path()), **environment},
                start_new_session=True,  # an interrupt at the terminal is for the parent
            )
        except (OSError, ValueError) as error:
            self._errors.close()
            raise NoChild(f"no process could be started: {error}") from error
        self._rows: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._rows), daemon=True).start()
        _children.add(self)
        try:
            first = self._next(time.monotonic() + READY_SECONDS)
        except (queue.Empty, EOFError) as problem:
            how = self._how(problem, READY_SECONDS)
            self.end()
            raise NoChild(f"a process that was started did not get ready: {how}") from None
        except BaseException:
            self.end()
            raise
        if "ready" not in first:
            self.end()
            raise NoChild(str(first.get("problem", first)))
        self.ready: Row = first["ready"]

    @property
    def alive(self) -> bool:
        """Whether it runs, and belongs to this process."""
        return self.owner == os.getpid() and self._process.poll() is None

    def ask(self, request: Row, title: str, journals: Path, seconds: float) -> Iterator[Row]:
        """The rows of the answer, each of which may take `seconds`.

        `title` is what `left_over` gives back with an attempt that nobody saw end.

        Raises: ChildEnded if the child ends before the answer does, or a row takes longer: then it
            is killed, and whenever this is left early.
        """
        journal = _journal(journals)
        try:
            self._write({**request, "journal": str(journal), "title": title, "seconds": seconds})
            while True:
                row = self._next(time.monotonic() + seconds)
                if "done" in row:
                    return
                if "failed" in row:  # its own program, not what it tried: a full disk, most likely
                    self.end()
                    raise ChildEnded(row["failed"], "", from_outside=False)
                if "lost" in row:
                    raise EOFError(row["lost"])
                yield row
        except (queue.Empty, EOFError, BrokenPipeError) as problem:
            how = self._how(problem, seconds)
            outside = -(self._process.returncode or 0) in FROM_OUTSIDE
            hung = isinstance(problem, queue.Empty)
            self.end()
            raise ChildEnded(how, in_flight(journal)[1], outside and not hung) from None
        except BaseException:  # an interrupt, or nobody wants the rest: it would answer it later
            self.end()
            raise
        finally:
            journal.unlink(missing_ok=True)

    def end(self) -> None:
        """End the child and wait for it."""
        if self.owner != os.getpid():  # of a parent that was forked
            return
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()  # the thread that reads closes the other pipe
        self._errors.close()

    def forget(self) -> None:
        """Close the pipes in a forked process, which would keep the child from seeing their end."""
        for file in (self._process.stdin, self._process.stdout, self._errors):
            if file is not None:
                file.close()
        if self._process.returncode is None:
            self._process.returncode = 0  # for this process it has ended

    def _write(self, row: Row) -> None:
        data = memoryview(json.dumps(row).encode() + b"\n")
        assert self._process.stdin is not None
        while data:
            data = data[self._process.stdin.write(data) or 0 :]

    def _next(self, deadline: float) -> Row:
        """The next row. Raises: queue.Empty at the deadline, EOFError if there is none."""
        line = self._rows.get(timeout=max(0.0, deadline - time.monotonic()))
        if not line.endswith(b"\n"):
            raise EOFError
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EOFError(f"it answered {line[:80]!r}") from error
        if not isinstance(row, dict):
            raise EOFError(f"it answered {line[:80]!r}")
        return row

    def _how(self, problem: BaseException, seconds: float) -> str:
        """How the child ended; it gets some time to do so."""
        if isinstance(problem, queue.Empty):
            self._process.kill()
            self._process.wait()
            return f"it took more than {seconds:g} s"
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if str(problem) and isinstance(problem, EOFError):
            return str(problem)
        if code < 0:
            return _signal_name(-code)
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 2000))
        said = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        return f"exit code {code}" + (f", {said}" if said else "")


def command(module: str) -> list[str]:
    """The command that starts this Python again to call a module's `main` with further words.

    Raises: NoChild if there is no Python that could be started.
    """
    if getattr(sys, "frozen", False):  # its program would start once more
        raise NoChild("a frozen program has no Python that could be started")
    if not sys.executable:
        raise NoChild("this Python does not know its own program (sys.executable is empty)")
    # not by `-m`, which would run a module once more that its package has imported already
    start = f"import sys; from {module} import main; main(*sys.argv[1:])"
    return [sys.executable, "-P", "-c", start]


def in_flight(journal: Path) -> tuple[str, str]:
    """A journal's title, and what was being tried when it was last written: "" where nothing was.

    A line that was cut short is of an attempt that never began.
    """
    try:
        lines = journal.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError:
        return "", ""
    return (lines[0], lines[-1] if len(lines) > 1 else "") if lines else ("", "")


def left_over(journals: Path) -> list[tuple[str, str]]:
    """Title and attempt of each journal that parent and child left when they ended together.

    A machine that did not survive an attempt makes it no second time. The journals are removed.
    """
    found = list[tuple[str, str]]()
    for path in sorted(journals.glob("*.journal")):
        try:
            if time.time() - path.stat().st_mtime < LEFT_OVER_SECONDS:
                continue
            found.append(in_flight(path))
            path.unlink()
        except OSError:  # another process was first
            continue
    return [(title, attempt) for title, attempt in found if attempt]


def _journal(folder: Path) -> Path:
    """A new, empty journal: in the folder, or where that cannot be written, in a temporary one.

    Raises: NoChild if neither can be written.
    """
    for place in (folder, Path(tempfile.gettempdir()) / folder.name):
        path = place / f"{uuid.uuid4().hex}.journal"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError:
            continue
        return path
    raise NoChild(f"no journal of attempts can be written in {folder}")


def _import_path() -> list[str]:
    """Where this process finds its modules, so that the child finds the same ones."""
    return [entry or str(Path.cwd()) for entry in sys.path if isinstance(entry, str)]


def _read(pipe: IO[bytes], rows: "queue.SimpleQueue[bytes]") -> None:
    """Put every line into the queue, and an empty one where the pipe ends."""
    with pipe:
        for line in _lines(pipe.fileno()):
            rows.put(line)
    rows.put(b"")


def _lines(file: int) -> Iterator[bytes]:
    """Whole lines as they come; no lock of a buffered file is held meanwhile."""
    pending = b""
    while data := os.read(file, 65536):
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            yield line + b"\n"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


_children: "weakref.WeakSet[Child]" = weakref.WeakSet()


def _forget_all() -> None:
    for child in list(_children):
        child.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


# ---- the child's side ----------------------------------------------------------------------------


class Journal:
    """Where the child writes what it is about to try."""

    def __init__(self, path: Path, title: str, seconds: float) -> None:
        self.path, self._seconds = path, seconds
        self._file = path.open("w", encoding="utf-8", newline="\n")
        self._file.write(f"{title}\n")

    @contextmanager
    def trying(self, attempt: str) -> Iterator[None]:
        """Note the attempt on the disk before it begins, and that it ended when it has.

        An attempt that raises `Lost` has not ended: it stays.
        """
        self._file.write(f"{attempt}\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.alive()
        try:
            yield
        except Lost:
            raise
        except BaseException:
            self._ended()
            raise
        self._ended()

    def alive(self) -> None:
        """Give what is being tried its full time once more."""
        # the parent ends what hangs; this is for a child without a parent, whatever lock it holds
        faulthandler.dump_traceback_later(2 * self._seconds, exit=True)

    def close(self) -> None:
        """Close the journal and remove its file."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _ended(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.write("\n")
        self._file.flush()


class Lost(Exception):
    """The child can go on no longer: its GPU has failed."""


Say = Callable[[Row], None]
Answer = Callable[[Row, Say, Journal], None]


def serve(prepare: Callable[[], Row], answer: Answer) -> NoReturn:
    """Answer requests until there are none for a while, or the parent has ended; never return.

    `prepare()` is what the parent gets as `Child.ready`; a RuntimeError or ValueError of it is the
    reason of a NoChild. `answer` says rows; if it raises, the child ends, and what it was trying is
    to blame for a `Lost` alone.
    """
    rows = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is no row

    def say(row: Row) -> None:
        rows.write(json.dumps(row).encode() + b"\n")

    requests: queue.SimpleQueue[Row] = queue.SimpleQueue()
    journals: list[Journal] = []
    threading.Thread(target=_listen, args=(requests, journals), daemon=True).start()
    try:
        say({"ready": prepare()})
    except (RuntimeError, ValueError) as problem:
        say({"problem": str(problem).partition("\n")[0]})
        os._exit(1)
    while True:
        try:
            request = requests.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            os._exit(0)  # a thread waits for the parent
        journal = Journal(Path(request["journal"]), request["title"], request["seconds"])
        journals[:] = [journal]
        try:
            answer(request, say, journal)
        except Lost as lost:
            say({"lost": str(lost)})
            sys.stderr.flush()
            os._exit(1)  # what tears down a lost context can hang
        except Exception as problem:
            say({"failed": f"{type(problem).__name__}: {problem}".partition("\n")[0]})
            raise
        journals.clear()
        journal.close()
        say({"done": True})


def _listen(requests: "queue.SimpleQueue[Row]", journals: Sequence[Journal]) -> None:
    """Puts every request into the queue, and ends the process where the parent has ended."""
    for line in _lines(sys.stdin.fileno()):
        requests.put(json.loads(line))
    for journal in journals:  # what is being tried is not to blame
        journal.path.unlink(missing_ok=True)
    os._exit(0)
