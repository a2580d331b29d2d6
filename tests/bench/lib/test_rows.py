"""What a row says of where it came from."""

import sys
from pathlib import Path

import pytest

from bench.lib import rows


def test_a_command_names_no_place_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model", "/a/place/lm", "--others", "prose=docs/log", "headers=/an/include/c10"]
    words += ["--output", "/elsewhere", "--recipes", "dense int4, gptq", "--grid=int4"]
    module = Path("/a/checkout/bench/run/bytes.py")
    monkeypatch.setattr(sys, "argv", [str(module), *words])
    told = rows.provenance("cpu")["command"]
    assert told == (
        "python -m bench.run.bytes --model lm --others prose=docs/log headers=c10 "
        "--recipes dense int4, gptq --grid=int4"
    )
