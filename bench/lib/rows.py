"""Raw rows of a bench: appended to bench/results/<bench>_<date>_<device>_<commit>.csv."""

import csv
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path

import torch

from secateur.core.processor import processor

Row = Mapping[str, str | int | float]


def append(folder: Path, bench: str, rows: Sequence[Row], device: str) -> Path:
    """Append the rows, each with where it came from, to this commit's file, and return its path."""
    origin = provenance(device)
    whole = [{**origin, **row} for row in rows]
    columns = list(dict.fromkeys(name for row in whole for name in row))
    path = path_of(folder, bench, device)
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open(newline="") as file:
            columns = next(csv.reader(file))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(columns)
    with path.open("a", newline="") as file:
        csv.DictWriter(file, columns, extrasaction="raise").writerows(whole)
    return path


def path_of(folder: Path, bench: str, device: str) -> Path:
    """The file of the rows that this commit measures on the device today."""
    place = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return folder / f"{bench}_{date.today():%Y-%m-%d}_{place}_{commit()}.csv"


def provenance(device: str) -> dict[str, str | int]:
    """What every row carries: when, on what, with which versions, from which commit and command."""
    cuda = device.startswith("cuda")
    return {
        "date": f"{date.today():%Y-%m-%d}",
        "time": f"{datetime.now(UTC):%H:%M}",
        "device": device_name(device),
        "driver": _driver() if cuda else "-",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "command": "python -m " + " ".join(_command()),
    }


def device_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return processor()


def commit() -> str:
    """The short commit, `+` behind it where files differ; BENCH_COMMIT names it for a bare copy."""
    if named := os.environ.get("BENCH_COMMIT"):
        return named
    git = ["git", "-C", str(Path(__file__).parents[2])]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return "none"
    dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "secateur", "bench/*.py"])
    return found.stdout.strip() + ("+" if dirty.returncode else "")


def _command() -> list[str]:
    """The module and its options, without the folder that the rows go to, or where others are."""
    module, options = Path(sys.argv[0]), list(sys.argv[1:])
    if "--output" in options:
        at = options.index("--output")
        del options[at : at + 2]
    return [".".join([*module.parts[-3:-1], module.stem]), *map(_without_place, options)]


def _without_place(option: str) -> str:
    """The option with the last part alone of an absolute path, also behind `NAME=`."""
    name, equals, path = option.rpartition("=")
    return f"{name}{equals}{Path(path).name}" if Path(path).is_absolute() else option


@cache
def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
