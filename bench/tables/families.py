"""The table of transformers' families that go the whole way."""

import json
from pathlib import Path

from bench.lib.results import Row, newest
from bench.tables.markdown import page

TOLD = 0.05  # of the parameters: a smaller reason is not in the table


def families(results: Path) -> str:
    """For each family the share of its parameters that is pruned, and what most of the rest is."""
    rows = newest(results, "families")[-1]
    lines = [[row["kind"], row["family"], _share(row), _rest(row)] for row in rows]
    first = rows[0]
    origin = (
        f"{len(rows)} families of transformers {first['transformers']} in their least sizes, of "
        "which embeddings are larger shares than of real models; random weights; torch "
        f"{first['torch']}, commit {first['commit']}, `python -m bench.run.families`. "
        "`tests/test_families.py` goes the same way in CI."
    )
    return page(["kind", "family", "pruned", "left dense"], lines, origin)


def _all(row: Row) -> int:
    return int(row["planned"]) + sum(json.loads(row["left"]).values())


def _share(row: Row) -> str:
    return f"{int(row['planned']) / _all(row):.0%}"


def _rest(row: Row) -> str:
    left = {why: n / _all(row) for why, n in json.loads(row["left"]).items()}
    told = [f"{share:.0%} {why.split(':')[0]}" for why, share in left.items() if share >= TOLD]
    return ", ".join(told) or "-"
