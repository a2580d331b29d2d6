"""The bench of what configurations cost a small vision transformer, end to end as a toy."""

from pathlib import Path

from bench.run import vision
from tests.bench.rows import rows_of


def test_the_transformer_is_pruned_recovered_and_packed(tmp_path: Path) -> None:
    assert vision.main(["--tiny", "--seeds", "5", "--output", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "vision")
    found = {(row["configuration"], row["recovery"]) for row in rows}
    expected = {
        (name, recovery)
        for name, configuration in vision.VISION.items()
        for recovery in ("none", *["reconstruct"] * bool(configuration.pruned), "train")
    }
    assert found == expected and len(rows) == len(expected)
    for row in rows:
        assert row["seed"] == "5" and row["left_out"] == "597"
        assert 0 <= float(row["top1"]) <= 1
