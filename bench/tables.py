"""The tables of the README and the docs, from the raw rows in bench/results.

    python -m bench.tables            # writes them
    python -m bench.tables --check    # exit code 1 if a file is stale

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; nothing there is typed by hand.
"""

import argparse
import csv
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
DENSES = ("dense", "dense prepacked")

Rows = Sequence[Mapping[str, str]]


def newest(results: Path, bench: str) -> Rows:
    """The rows of the bench's latest file by date in its name, then by when it was written."""
    files = sorted(
        results.glob(f"{bench}_*.csv"),
        key=lambda path: (path.name.split("_")[1], path.stat().st_mtime),
    )
    if not files:
        raise ValueError(f"tables need rows of {bench}, got none in {results}: run bench.{bench}")
    with files[-1].open(newline="") as file:
        return list(csv.DictReader(file))


def linear_cpu(results: Path) -> str:
    """Speed-up over eager / over prepacked dense, by format and sparsity, a column for each number
    of tokens, and where the rows came from.
    """
    rows = newest(results, "linear")
    tokens = sorted({int(row["tokens"]) for row in rows})
    heads = ["layer", "runs", "zeros", "bytes", *[f"{count} tokens" for count in tokens]]
    lines = [_line(heads), _line(["---"] * len(heads))]
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    dense_bytes = {
        row["layer"]: int(row["weight_bytes"]) for row in rows if row["candidate"] == "dense"
    }
    for row in rows:
        if row["candidate"] in DENSES:
            continue
        share = int(row["weight_bytes"]) / dense_bytes[row["layer"]]
        shape = f"{row['out']} x {row['in']}"
        key = (shape, row["candidate"], f"{float(row['sparsity']):.0%}", f"{share:.2f}")
        ratio = f"{float(row['vs_eager']):.2f} / {float(row['vs_prepacked']):.2f}"
        winning = min(float(row["vs_eager"]), float(row["vs_prepacked"])) >= 1
        cells.setdefault(key, {})[int(row["tokens"])] = f"**{ratio}**" if winning else ratio
    lines += [
        _line([*key, *[by_tokens.get(count, "-") for count in tokens]])
        for key, by_tokens in cells.items()
    ]
    return "\n".join([*lines, "", _origin(rows)]) + "\n"


TABLES: dict[str, Callable[[Path], str]] = {"linear-cpu": linear_cpu}


def render(text: str, results: Path) -> str:
    """The text with every table in it made anew.

    Raises: ValueError for a name that is no table.
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"no table is named {name!r}: tables are {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[name](results)}\n{match[3]}"

    return BLOCK.sub(table, text)


def stale(files: Sequence[Path], results: Path, write: bool) -> list[Path]:
    """The files whose tables differ from the rows; with `write` they are brought up to date."""
    found = []
    for path in files:
        text = path.read_text()
        fresh = render(text, results)
        if fresh != text:
            found.append(path)
            if write:
                path.write_text(fresh)
    return found


def _origin(rows: Rows) -> str:
    first = rows[0]
    loudest = max(float(row["others"]) for row in rows)
    return (
        f"Speed-up over eager / over prepacked dense, {first['dtype']}, {first['threads']} "
        f"threads, {first['device']}, torch {first['torch']}, {first['date']}, commit "
        f"{first['commit']}, `{first['command']}`; bold where it beats both; other processes took "
        f"at most {loudest:.0%} of the machine."
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(words: Sequence[str] | None = None) -> int:
    """Writes the tables, or with --check says which files are stale; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("files", nargs="*", type=Path)
    arguments = parser.parse_args(words)
    files = arguments.files or [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    found = stale(files, arguments.results, write=not arguments.check)
    for path in found:
        print(f"{path}: {'stale, run python -m bench.tables' if arguments.check else 'written'}")
    return int(arguments.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
