"""`secateur check`: its exit codes, and the plans that it takes."""

import json
from pathlib import Path

from safetensors.torch import save_file

from tests.cli.shell import refused, run, said, tokens, weights


def test_check_ends_with_0_or_1(dense: Path, pruned: Path) -> None:
    assert "all 14 layers hold their pattern" in said(run("check", pruned))
    found = json.loads(said(run("check", pruned, "-p", "4:8", "--json")))
    assert found["ok"] and found["layers"][0] == {
        "layer": "model.layers.0.self_attn.q_proj", "pattern": "4:8", "zeros": "50.00%",
        "verdict": "holds",
    }  # fmt: skip
    result = run("check", pruned, "-p", "1:4")
    assert refused(result, 1) == "error: 14 of 14 layers break the plan"
    assert "512 groups of 4 keeping more than 1" in result.stdout
    found = json.loads(said(run("check", pruned, "-p", "1:4", "--json"), 1))
    assert not found["ok"] and "break the plan" in found["error"]


def test_check_finds_one_lost_zero(dense: Path, pruned: Path, tmp_path: Path) -> None:
    changed = weights(pruned)
    name = "model.layers.1.mlp.down_proj.weight"
    changed[name][3, :4] = 1
    out = tmp_path / "changed"
    out.mkdir()
    for file in pruned.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    save_file(changed, out / "model.safetensors", {"format": "pt"})
    for verb in (
        ("check",),
        ("inspect",),
        ("eval", "--rows", "8", "--tokens", tokens(dense, "validation")),
    ):
        line = refused(run(verb[0], out, *verb[1:]))
        assert "model.safetensors was changed after it was saved, its sha256 differs" in line
    (out / "secateur.json").unlink()  # which vouches for the files; without it the zeros count
    result = run("check", out, "-p", "2:4")
    assert refused(result, 1) == "error: 1 of 14 layers break the plan"
    assert "model.layers.1.mlp.down_proj" in result.stdout and "keeping 4" in result.stdout
    assert "q_proj" not in result.stdout


def test_check_needs_a_plan_for_this_model(dense: Path, pruned: Path, encoder: Path) -> None:
    assert "has no secateur.json with a plan" in refused(run("check", dense))
    plan = pruned.with_name("other.yaml")
    said(run("plan", encoder, "-p", "2:4", "-o", plan))
    assert "made for another model" in refused(run("check", pruned, "--plan", plan))
