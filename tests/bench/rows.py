"""Rows of a bench, read back as text, or written as the bench of single layers would."""

import csv
from collections.abc import Mapping
from pathlib import Path

COLUMNS = (
    *("date", "device", "threads", "torch", "commit", "command", "layer", "out", "in", "dtype"),
    *("tokens", "candidate", "sparsity", "weight_bytes", "vs_eager", "vs_prepacked", "others"),
)


def rows_file(
    folder: Path,
    name: str,
    ratios: Mapping[tuple[str, int], tuple[str, str]],
    device: str = "a chip",
) -> None:
    """A file of rows with these (candidate, tokens) -> (vs eager, vs prepacked)."""
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        whole = {("dense", 1): ("1.0", "0.9"), ("dense prepacked", 1): ("1.1", "1.0"), **ratios}
        for (candidate, tokens), (eager, prepacked) in whole.items():
            size = 400 if candidate.startswith("dense") else 84
            measured = [tokens, candidate, "0.8", size, eager, prepacked, "0.03"]
            place = ["2026-11-22", device, 2, "2.13", "abc", "python -m x", "q", 8, 4, "float32"]
            writer.writerow(dict(zip(COLUMNS, [*place, *measured], strict=True)))


def rows_of(folder: Path, bench: str) -> list[dict[str, str]]:
    """The rows of the bench's only file in the folder."""
    (path,) = folder.glob(f"{bench}_*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
