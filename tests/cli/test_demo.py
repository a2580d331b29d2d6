"""`secateur demo`: the job is called with its folder."""

from pathlib import Path

import pytest

from tests.cli.shell import run, said


def test_demo_calls_the_job_with_its_folder(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("secateur.cli.demo.run", lambda *arguments: calls.append(arguments))
    said(run("demo", "-o", tmp_path, "--model", dense))
    assert calls == [(tmp_path, dense)]
