"""Measured increases survive on disk, and another call's are refused."""

from pathlib import Path

import pytest

from secateur.allocation.progress import Progress, write_json
from secateur.core.disk.data_files import read_json


def test_what_is_added_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    progress = Progress(path, {"call": 1})
    assert not progress.has("a", "2:4")
    assert progress.dense_loss(0.1 + 0.2) == 0.1 + 0.2
    progress.add("a", "2:4", 1 / 3)
    progress.add("a", "1:4", 0.0)
    again = Progress(path, {"call": 1})
    assert again.get("a", "2:4") == 1 / 3
    assert again.has("a", "1:4") and not again.has("b", "1:4")
    assert again.dense_loss(0.3 * (1 + 1e-5)) == 0.1 + 0.2  # the stored one counts
    with pytest.raises(ValueError, match=r"has a dense loss of 0\.3, now it is 0\.301"):
        again.dense_loss(0.301)
    with pytest.raises(ValueError, match="belongs to another call, its call differs"):
        Progress(path, {"call": 2})


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    progress = Progress(None, {})
    progress.add("a", "2:4", 1.0)
    assert progress.get("a", "2:4") == 1.0
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float values"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_number_that_was_changed_is_not_believed(line: int, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    progress = Progress(path, {"call": 11})
    progress.dense_loss(11.0)
    progress.add("a", "2:4", 11.0)
    lines = path.read_text().splitlines()
    lines[line] = lines[line].replace("11", "17", 1)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        ValueError, match=r"kept.json is no checkpoint of sensitivity: a line was changed"
    ):
        Progress(path, {"call": 11})
