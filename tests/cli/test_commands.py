"""The command line as a whole: its help and its version."""

import subprocess
import sys

import secateur as sc
from tests.cli.shell import run, said


def test_help_lists_every_verb_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom secateur.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'transformers', 'tokenizers', 'matplotlib', 'jinja2', 'pydantic', 'starlette'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    verbs = (
        "doctor inspect sensitivity plan allocate prune stream recover eval bench tune check "
        "export migrate accelerate generate serve report demo"
    )
    assert all(f" {verb} " in done.stdout for verb in verbs.split())


def test_version() -> None:
    assert said(run("--version")) == f"secateur {sc.__version__}\n"
