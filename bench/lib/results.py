"""The rows that were measured, read back from bench/results; its README.md says what each is."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"

Row = Mapping[str, str]
Rows = Sequence[Row]


def every(results: Path, bench: str) -> list[Rows]:
    """The rows of each of the bench's files, oldest first; a file is of one device and commit."""
    return [read(path) for path in _files(results, bench)]


def newest(results: Path, bench: str) -> list[Rows]:
    """The rows of each of the bench's files of its latest date."""
    files = _files(results, bench)
    return [read(path) for path in files if _date(path) == _date(files[-1])]


def read(path: Path) -> Rows:
    """The rows of one file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _files(results: Path, bench: str) -> list[Path]:
    files = sorted(sorted(results.glob(f"{bench}_*.csv")), key=_begun)
    if not files:
        module = f"bench.run.{bench.replace('-', '_')}"
        raise ValueError(f"tables need rows of {bench}, got none in {results}: run {module}")
    return files


def _begun(path: Path) -> tuple[str, str]:
    """Date and time of the file's first row; older rows have no time and are the day's first."""
    rows = read(path)
    return _date(path), rows[0].get("time", "") if rows else ""


def _date(path: Path) -> str:
    return path.name.split("_")[1]
