"""`secateur doctor`: every format, with what it needs."""

import json

from tests.cli.shell import run, said


def test_doctor_lists_every_format() -> None:
    found = json.loads(said(run("doctor", "--json")))
    told = {entry["capability"]: entry["state"] for entry in found}
    assert told["torch"] == "info" and told["semi24 reference"] == "yes"
    assert "csr reference" in said(run("doctor", "--all"))
    lines = said(run("doctor")).splitlines()
    assert len(lines) == 5 and "secateur doctor --all" in lines[-1]
    assert [line.partition(":")[0] for line in lines[:4]] == [
        "this machine", "sparse here", "not here", "to install",
    ]  # fmt: skip
