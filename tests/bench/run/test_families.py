"""The bench of families: a row for each, with the account of its plan."""

import json
from pathlib import Path

import pytest

from bench.lib.families import FAMILIES, model_of
from bench.run import families
from bench.tables.pages import TABLES
from tests.bench.rows import rows_of


def test_a_row_accounts_for_every_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    some = [family for family in FAMILIES if family.stem in ("GPT2", "Swin")]
    monkeypatch.setattr(families, "FAMILIES", some)
    families.main(["--output", str(tmp_path)])
    for family, row in zip(some, rows_of(tmp_path, "families"), strict=True):
        everything = sum(p.numel() for p in model_of(family).parameters())
        assert int(row["planned"]) + sum(json.loads(row["left"]).values()) == everything
    assert "| decoder | GPT2 | 65% | 29% embeddings, 6% vectors |" in TABLES["families"](tmp_path)
