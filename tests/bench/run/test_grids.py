"""The bench of grids: searched scales lose no more than plain ones."""

from pathlib import Path

from bench.run import grids
from bench.tables.pages import TABLES
from tests.bench.rows import rows_of


def test_grids_lose_less_with_searched_scales(tmp_path: Path) -> None:
    grids.main(["--output", str(tmp_path)])
    rows = rows_of(tmp_path, "grids")
    found = {(r["weights"], r["grid"], r["scales"]): float(r["error"]) for r in rows}
    assert len(found) == 16
    for (name, grid, way), lost in found.items():
        if way == "searched":
            assert lost <= found[name, grid, "largest"]
    assert 0.08 < found["normal", "Int4()", "searched"] < 0.083
    assert "| `Int8()` | 0.0066 | 0.0066 |" in TABLES["grids"](tmp_path)
