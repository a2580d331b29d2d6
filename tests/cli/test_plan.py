"""`secateur plan` of the reference model."""

import json
from pathlib import Path

import pytest

from tests.cli.shell import run, said

REFERENCE = Path(__file__).parents[3] / "shared" / "models" / "reference-lm"


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="shared/models/reference-lm is not here")
def test_the_reference_model_is_planned_with_its_tied_head_left_alone() -> None:
    found = json.loads(said(run("plan", REFERENCE, "-p", "2:4", "--json")))
    assert len(found["layers"]) == 56 and list(found["skipped"]) == ["lm_head"]
