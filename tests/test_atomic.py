"""A folder appears whole or not at all, and what is not replaced stays."""

from pathlib import Path

import pytest

from secateur.atomic import appearing_whole, require_not_interrupted


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


def test_a_kill_between_the_renames_is_found_and_explained(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    require_not_interrupted(folder)
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "model").write_text("0")
    with pytest.raises(ValueError, match=r"out was killed: rename .*/\.out\.replaced back to it"):
        require_not_interrupted(folder)
    with appearing_whole(folder, replaced) as partial:
        (partial / "model").write_text("1")
    require_not_interrupted(folder)
    with appearing_whole(folder, replaced) as partial:  # what is left of an older save is no hurdle
        (partial / "model").write_text("2")
    assert contents(tmp_path) == {"out/model": "2"}
