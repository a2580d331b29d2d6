"""A folder appears whole or not at all, and files that are not replaced stay."""

import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from secateur.core.disk.atomic import appearing_whole, settle, write_whole


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def replaced(name: str) -> bool:
    return name.startswith("model")


def test_a_new_folder_appears_with_its_parents(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with appearing_whole(folder, replaced) as partial:
        (partial / "model").write_text("new")
        assert not folder.exists()
    assert contents(tmp_path) == {"a/b/model": "new"}


def test_an_old_folder_is_exchanged_and_others_files_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "a.txt").write_text("mine")
    (folder / "model-1").write_text("old")
    (folder / "model-2").write_text("old")
    (folder / "link").symlink_to("model-1")
    with appearing_whole(folder, replaced) as partial:
        (partial / "model-1").write_text("new")
        assert contents(folder)["model-1"] == "old"
    assert contents(tmp_path) == {
        "out/link": "new",
        "out/model-1": "new",
        "out/notes/a.txt": "mine",
    }
    assert (folder / "link").is_symlink()


@pytest.mark.parametrize("old", [True, False])
def test_if_the_block_raises_nothing_has_changed(tmp_path: Path, old: bool) -> None:
    folder = tmp_path / "out"
    if old:
        folder.mkdir()
        (folder / "model").write_text("old")
    with pytest.raises(KeyboardInterrupt), appearing_whole(folder, replaced) as partial:
        (partial / "model").write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == ({"out/model": "old"} if old else {})
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if old else [])


def test_if_the_exchange_fails_the_old_folder_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model").write_text("old")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError("no space")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no space"), appearing_whole(folder, replaced) as partial:
        (partial / "model").write_text("new")
    assert contents(tmp_path) == {"out/model": "old"}


def test_a_kill_between_the_renames_is_healed_by_the_next_call(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    settle(folder)  # nothing was killed
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "model").write_text("0")
    settle(folder)
    assert contents(tmp_path) == {"out/model": "0"}
    (tmp_path / ".out.replaced").mkdir()
    settle(folder)  # the folder is there, so the one aside is a leftover
    with appearing_whole(folder, replaced) as partial:
        (partial / "model").write_text("1")
    assert contents(tmp_path) == {"out/model": "1"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_exchange_that_is_under_way_is_not_healed(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with appearing_whole(folder, replaced) as partial:
        (tmp_path / ".out.replaced").mkdir()
        settle(folder)  # as another process might, between the renames of this one
        assert not folder.exists()
        (tmp_path / ".out.replaced").rmdir()
        (partial / "model").write_text("1")
    assert contents(tmp_path) == {"out/model": "1"}


def test_an_old_content_that_cannot_be_put_back_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    (tmp_path / ".out.replaced").mkdir()
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ValueError, match=r"out was killed.*\.out\.replaced.*Permission denied"):
        settle(tmp_path / "out")


def killed(work: Callable[[], object]) -> None:
    """Run in a child that is killed at the end, as by `kill -9`."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("name", ["out", "out[1]*", "a b"])
def test_leftovers_of_the_killed_are_removed_and_those_of_the_living_stay(
    tmp_path: Path, name: str
) -> None:
    folder = tmp_path / name

    def begin(folder: Path) -> None:
        with appearing_whole(folder, replaced) as partial:
            (partial / "model").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    killed(lambda: begin(folder))
    killed(lambda: begin(tmp_path / "other"))
    assert len(list(tmp_path.iterdir())) == 2
    with appearing_whole(folder, replaced) as mine:
        (mine / "model").write_text("mine")
        assert len(list(tmp_path.iterdir())) == 2  # this name's and another's
        with appearing_whole(folder, replaced) as second:
            assert mine.exists()
            (second / "model").write_text("second")
    assert contents(folder) == {"model": "mine"}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_is_written_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_whole(file, "é")
    assert file.read_bytes() == "é".encode()
    write_whole(file, b"\0")
    assert file.read_bytes() == b"\0"

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "longer")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.json", b"\0")]


def test_a_killed_write_leaves_no_more_than_the_next_one_clears(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_whole(file, "old")

    def begin() -> None:
        Path.replace = lambda path, target: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
        write_whole(file, "new")

    killed(begin)
    assert len(list(tmp_path.iterdir())) == 2
    assert file.read_text() == "old"
    write_whole(file, "next")
    assert contents(tmp_path) == {"a.json": "next"}


def test_files_and_folders_have_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with appearing_whole(tmp_path / "out", replaced) as partial:
            (partial / "model").write_text("1")
        write_whole(tmp_path / "a.json", "1")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert modes == {"out": 0o750, "a.json": 0o640}
