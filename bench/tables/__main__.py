"""The tables of the README and the docs, from the raw rows in bench/results.

    python -m bench.tables            # writes them
    python -m bench.tables --check    # exit code 1 if a file is stale

A page has markers where a table stands; the figure is a file of its own.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.lib.results import RESULTS
from bench.tables.pages import FIGURES, ROOT, stale


def main(words: Sequence[str] | None = None) -> int:
    """Writes the tables, or with --check says which files are stale; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("files", nargs="*", type=Path)
    arguments = parser.parse_args(words)
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    files = arguments.files or [*pages, *FIGURES]
    found = stale(files, arguments.results, write=not arguments.check)
    for path in found:
        print(f"{path}: {'stale, run python -m bench.tables' if arguments.check else 'written'}")
    return int(arguments.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
