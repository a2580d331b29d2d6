"""`secateur migrate` on files: what it writes, prints, and leaves."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur.cli import app

OLD = "from torchao.sparsity import sparsify_, gone\nsparsify_(model, config)\n"
NEW = (
    "from torchao.sparsity import gone\n"
    "from secateur.compat.torchao.sparsity import sparsify_\n"
    "sparsify_(model, config)\n"
)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["migrate", *map(str, arguments)])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("a.py", "deep/b.py", "venv/lib.py", ".hidden/c.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(OLD)
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    (tmp_path / "broken.py").write_text("def (: from torchao.sparsity import sparsify_\n")
    (tmp_path / "other.py").write_text("import torch\n")
    return tmp_path


def texts(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


def test_a_folder_is_changed_where_it_should_be_and_told(project: Path) -> None:
    (project / "a.py").chmod(0o750)
    before = texts(project)
    result = run(project)
    assert result.exit_code == 0, result.output
    assert texts(project) == {**before, "a.py": NEW, str(Path("deep/b.py")): NEW}
    assert stat.S_IMODE((project / "a.py").stat().st_mode) == 0o750
    assert "2 files changed" in result.stdout
    assert f"{project / 'a.py'}:1" in result.stdout and "takes functions again" in result.stdout
    assert "has no gone" in result.stdout and "cannot be parsed" in result.stdout
    assert "0 files changed" in run(project).stdout


def test_a_dry_run_prints_the_diff_and_writes_nothing(project: Path) -> None:
    before = texts(project)
    result = run(project / "a.py", "--dry-run")
    assert texts(project) == before
    lines = result.stdout.splitlines()
    assert "-from torchao.sparsity import sparsify_, gone" in lines
    assert "+from secateur.compat.torchao.sparsity import sparsify_" in lines
    assert lines[-1] == "1 file would be changed"


def test_json_has_all_of_it(project: Path) -> None:
    found = json.loads(run(project, "--json", "--dry-run").stdout)
    assert found["files"] == [str(project / "a.py"), str(project / "deep" / "b.py")]
    assert not found["written"]
    assert found["moved"][0] == {
        "place": f"{project / 'a.py'}:1",
        "old": "torchao.sparsity",
        "new": "secateur.compat.torchao.sparsity",
        "names": "sparsify_",
    }
    assert {row["left alone"] for row in found["left"]} == {"torchao.sparsity.gone", "the file"}
    assert [row["name"] for row in found["differences"]] == ["sparsify_"]


def test_a_link_stays_a_link(project: Path) -> None:
    link = project / "deep" / "link.py"
    link.symlink_to(project / "a.py")
    assert run(link).exit_code == 0
    assert link.is_symlink() and (project / "a.py").read_text() == NEW


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path / "nowhere")
    assert result.exit_code == 2 and "does not exist" in result.stderr
