"""transformers' families go the whole way, and the table of them says what is true."""

import json
from pathlib import Path

import pytest

from bench.lib.families import FAMILIES, Family, whole_way
from bench.lib.results import RESULTS, newest

pytest.importorskip("transformers")


def test_there_are_forty_families_and_more_of_every_kind() -> None:
    kinds = [family.kind for family in FAMILIES]
    assert len({family.stem for family in FAMILIES}) == len(FAMILIES) >= 40
    assert min(map(kinds.count, kinds)) >= 3 and len(set(kinds)) == 8


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.stem)
def test_a_family_goes_the_whole_way(family: Family, tmp_path: Path) -> None:
    plan = whole_way(family, tmp_path / "out")
    (row,) = [r for r in newest(RESULTS, "families")[-1] if r["family"] == family.stem]
    assert row["kind"] == family.kind
    assert (int(row["planned"]), json.loads(row["left"])) == (plan.weights, dict(plan.left))
