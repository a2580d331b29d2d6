"""The bench of searches: a row says what was found and which setting crashed, each time anew."""

import json
from pathlib import Path

import pytest

from bench.lib import results
from bench.run import searches
from secateur.formats.kernels import cusparselt_child
from tests.formats.kernels.fake_cusparselt import Fake, forget, install
from tests.formats.kernels.faulty_child import VARIABLE


def test_every_search_tries_everything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, tmp_path / "cache", Fake({}), isolated=True)
    monkeypatch.setattr(cusparselt_child, "MODULE", "tests.formats.kernels.faulty_child")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "told.json"))
    told = {
        "us": {"0,1,-1": 3.0, "1,1,-1": 1.0, "2,1,-1": 2.0},
        "faults": {"1,1,-1": "SIGILL"},
        "wrong": ["0,1,-1"],
        "notes": str(tmp_path / "notes"),
        "cache": str(tmp_path / "cache"),
    }
    (tmp_path / "told.json").write_text(json.dumps(told))
    words = "--device cpu --searches 2 --shape 32 64 --tokens 16 --output"
    assert searches.main([*words.split(), str(tmp_path / "rows")]) == 0
    *lines, path = capsys.readouterr().out.splitlines()
    rows = results.read(Path(path))
    printed = [line for line in lines if line.startswith("{")]
    assert [row["bias"] for row in rows] == ["False", "True"] and len(printed) == 2
    assert len([line for line in lines if line.endswith("1,1,-1 ended a child: SIGILL")]) == 2
    # 0 and 2, four refused in a row, 2 with split sums, in turns with itself alone, and checked
    assert {row["attempts"] for row in rows} == {str(2 + 4 + 6 + 2)}
    assert len([line for line in lines if " s for " in line]) == 2 * 14
    assert all(row["whole"] == "True" and row["slowest"].count(" s") == 3 for row in rows)
    for row, line in zip(rows, printed, strict=True):
        assert row["crashed"] == json.loads(line)["crashed"] == "1,1,-1: SIGILL"
        assert (row["algorithm"], row["us"], row["dtype"]) == ("2", "2.0", "float16")
        assert (row["wrong"], row["right"], row["note"]) == ("0,1,-1", "1", "")
    assert not (tmp_path / "cache").exists() and cusparselt_child._kept.child is None
    with pytest.raises(SystemExit):
        searches.main(["--tokens", "100"])
    assert "powers of two from 16" in capsys.readouterr().err
    forget()
