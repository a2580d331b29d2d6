"""The bench of tokens a second: a row for each configuration, with what made the tokens."""

from pathlib import Path

import pytest

from bench.lib import results
from bench.run import llm
from bench.tables.pages import TABLES

WORDS = "--model tiny --device cpu --prompt 5 --tokens 4 --rounds 2".split()


def test_each_configuration_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    words = [*WORDS, "--output", str(tmp_path), "--head", "semi24"]
    loops = ["steps", "generate", "custom_generate"]
    assert llm.main([*words, "--formats", "dense", "semi24_int4", "--loops", *loops]) == 0
    rows = results.read(Path(capsys.readouterr().out.split()[-1]))
    named = [(row["format"], row["head"], row["loop"]) for row in rows]
    assert named == [
        *(("dense", "dense", loop) for loop in loops),
        *(("semi24_int4", "semi24", loop) for loop in loops),
    ]
    for row in rows:
        assert row["note"] == "" and (row["model"], row["blocks"], row["batch"]) == (
            "tiny",
            "2",
            "1",
        )
        assert float(row["tokens_s"]) == pytest.approx(1e3 / float(row["ms"]), rel=0.01)
        assert float(row["first_ms"]) > 0 and row["allocated"] == row["peak"] == ""
    assert rows[0]["runs"].startswith("the model's own forward")
    assert rows[1]["runs"] == "transformers' generate, static cache, compiled"
    assert "| 2:4, int4 | 2:4, bf16 | its own |" in TABLES["llm"](tmp_path)


def test_what_fails_has_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: object) -> None:
        raise RuntimeError("no room. And more")

    monkeypatch.setattr(llm, "steps_of", refuses)
    assert llm.main([*WORDS, "--output", str(tmp_path), "--formats", "dense"]) == 0
    (row,) = results.read(Path(capsys.readouterr().out.split()[-1]))
    assert row["note"].startswith("RuntimeError: no room") and row["ms"] == ""
