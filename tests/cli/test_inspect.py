"""`secateur inspect`: zeros, and layers that are left alone."""

import json
from pathlib import Path

from tests.cli.shell import run, said


def test_inspect_shows_zeros_and_why_layers_are_left_alone(dense: Path, pruned: Path) -> None:
    text = said(run("inspect", pruned))
    (line,) = [li for li in text.splitlines() if "model.layers.0-1.mlp.up_proj" in li]
    assert line.split() == "model.layers.0-1.mlp.up_proj 64 32 bfloat16 50.0% 2:4 4:8 64x64".split()
    assert "left alone: lm_head: its weight is tied to model.embed_tokens" in text
    found = json.loads(said(run("inspect", dense, "--json")))
    assert {layer["zeros"] for layer in found["layers"]} == {0.0}
    assert len(found["layers"]) == 16 and set(found["left_alone"]) == {
        "lm_head", "model.embed_tokens",
    }  # fmt: skip
