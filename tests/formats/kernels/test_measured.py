"""Tables on disk: what is added stays beside what was there, whole or not at all."""

import json
from pathlib import Path

import pytest

from secateur.formats.kernels.measured import Entries, add, own_file, read

NUMBERS = Entries("numbers", int, "write them again")


def test_a_table_grows_by_what_is_added(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    assert read(path, NUMBERS) == {}
    add(path, NUMBERS, ("a", "b", "8"), "1")
    add(path, NUMBERS, ("a", "b", "16"), "2")
    add(path, NUMBERS, ("a", "c", "8"), "3")
    add(path, NUMBERS, ("a", "b", "8"), "4")
    assert read(path, NUMBERS) == {"a": {"b": {"8": "4", "16": "2"}, "c": {"8": "3"}}}
    assert json.loads(path.read_text()) == read(path, NUMBERS)
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}', '{"a": {"b": {"8": "x"}}}', "\xff"])
def test_another_file_is_named_and_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(
        ValueError,
        match="(needs to be a table of numbers, got|cannot be read as JSON): .*: write them",
    ) as e:
        add(path, NUMBERS, ("a", "b", "8"), "1")
    assert str(path) in str(e.value)
    assert path.read_text(encoding="latin-1") == text


def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.json"
    add(path, NUMBERS, ("a", "b", "8"), "1")

    def refused(path: Path, target: Path) -> Path:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(OSError, match="Read-only"):
        add(path, NUMBERS, ("a", "b", "8"), "2")
    assert read(path, NUMBERS) == {"a": {"b": {"8": "1"}}}
    assert [file.name for file in tmp_path.iterdir()] == ["table.json"]


def test_own_files_lie_beside_the_compiled_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    assert own_file("a.json") == tmp_path / "a.json"
