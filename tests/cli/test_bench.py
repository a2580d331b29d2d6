"""`secateur bench`: what runs, and why."""

import json
from pathlib import Path

from tests.cli.shell import refused, run, said


def test_bench_says_what_runs_and_why(pruned: Path) -> None:
    command = (
        "bench",
        pruned,
        "--tokens-per-call",
        "4,1",
        "--layers",
        "model.layers.0.mlp.up_proj",
    )
    found = json.loads(said(run(*command, "--json")))
    assert found["tokens"] == [1, 4]
    (layer,) = found["layers"]
    assert layer["layer"] == "model.layers.0.mlp.up_proj" and layer["shape"] == [64, 32]
    text = said(run(*command))
    assert "measured on cpu" in text and layer["reason"].split(":")[0][:20] in text
    assert "what would be faster here" in text or "would not be faster here either" in text
    (heads,) = [line for line in text.splitlines() if line.strip().startswith("layer ")]
    assert heads.split() == "layer tokens runs eager us prepacked us sparse us".split()
    assert "vs prepacked" in said(run(*command, "--full"))
    line = refused(run("bench", pruned, "--tokens-per-call", "1,x"))
    assert "needs numbers of at least 1 separated by commas, got '1,x'" in line
