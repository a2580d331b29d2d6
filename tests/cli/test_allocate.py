"""`secateur allocate`: a plan file by shapes, by outliers, and by curves within a budget."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import secateur as sc
from secateur.allocation import allocate, costs, equalize, erk, owl, read_sensitivity
from secateur.integrations.tokens import end_of_text, stored_rows
from secateur.integrations.transformers import load_folder
from tests.cli.shell import ROWS, refused, run, said, tokens

TRIED = ("-p", "2:4", "-p", "unstructured:0.3", "-p", "unstructured:0.7")


@pytest.fixture(scope="module")
def curves(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The curves of the model's layers, measured by the command line."""
    out = tmp_path_factory.mktemp("curves") / "sense.json"
    rows = ("--tokens", tokens(dense, "validation"), "--rows", 2)
    text = said(run("sensitivity", dense, *TRIED, *rows, "-o", out))
    assert f"next: `secateur allocate {dense} --sensitivity {out} --budget 50%" in text
    return out


@pytest.mark.parametrize("by", ["budget", "equalize"])
@pytest.mark.parametrize("unit", ["parameters", "bytes"])
def test_curves_and_a_budget_make_a_plan_that_prune_takes(
    dense: Path, curves: Path, tmp_path: Path, by: str, unit: str
) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    text = said(
        run(
            "allocate", dense, "--sensitivity", curves, "--budget", "70%", "--by", by,
            "--unit", unit, "-o", plan,
        )
    )  # fmt: skip
    model, found = load_folder(dense), read_sensitivity(curves)
    table = costs.parameters(found) if unit == "parameters" else costs.nbytes(model, found)
    way = allocate if by == "budget" else equalize
    expected = way(found, table, 0.7 * table.dense)
    assert sc.read_plan(plan).to_dict() == sc.plan(model, expected.patterns).to_dict()
    assert next(model.parameters()).dtype == torch.bfloat16  # bytes are those on the disk
    assert "<- chosen" in text and f"{unit}, of " in text
    assert f"next: `secateur prune {dense} --plan {plan} -o OUT`" in text
    assert expected.best.cost <= 0.7 * table.dense
    said(run("prune", dense, "--plan", plan, "-o", out))
    assert sc.check(load_folder(out), sc.read_plan(plan))


def test_a_budget_may_be_a_number_of_the_unit(dense: Path, curves: Path) -> None:
    found = read_sensitivity(curves)
    table = costs.parameters(found)
    half = f"{table.dense / 2:,.0f}"
    options = ("--sensitivity", curves, "--json")
    one = json.loads(said(run("allocate", dense, *options, "--budget", half)))
    two = json.loads(said(run("allocate", dense, *options, "--budget", "50%")))
    assert one == two
    assert one["plan"]["layers"]
    assert {"cost", "of dense", "increase"} == one["front"][0].keys()
    assert 0.45 < max(point["of dense"] for point in one["front"] if point["cost"] <= 10_240) <= 0.5


def test_erk_needs_shapes_alone_and_takes_a_state_dict(dense: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    said(run("allocate", dense, "--by", "erk", "-p", "unstructured:0.6", "-o", plan))
    model = load_folder(dense)
    expected = sc.plan(model, erk(model, "unstructured:0.6"))
    assert sc.read_plan(plan).to_dict() == expected.to_dict()
    weights = {"a.weight": torch.randn(16, 8), "b.weight": torch.randn(64, 32)}
    save_file(weights, tmp_path / "some.safetensors")
    alone = tmp_path / "some.safetensors"
    found = json.loads(
        said(run("allocate", alone, "--by", "erk", "-p", "unstructured:0.6", "--json"))
    )
    assert list(found["plan"]["layers"]) == ["a", "b"] and found["front"] == []
    line = refused(run("allocate", alone, "--by", "owl", "-p", "unstructured:0.6"))
    assert "is a bare state dict" in line and "or use --by erk" in line


def test_owl_reads_data_and_takes_layers(dense: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    data = ("--tokens", tokens(dense, "calibration"), "--rows", ROWS)
    options = ("--layers", "*.mlp.*", "--ignore", "*.down_proj")
    said(
        run("allocate", dense, "--by", "owl", "-p", "unstructured:0.5", *data, *options, "-o", plan)
    )
    model = load_folder(dense).float()
    batches = stored_rows(tokens(dense, "calibration"), ROWS, 8, end_of_text(dense)).batches
    patterns = owl(model, "unstructured:0.5", batches, layers=["*.mlp.*"], ignore=["*.down_proj"])
    found = sc.read_plan(plan)
    assert list(found.layers) == list(patterns) and len(patterns) == 4
    for name, pattern in found.layers.items():
        assert pattern.sparsity == pytest.approx(patterns[name].sparsity, abs=1e-5)


def test_what_allocate_refuses(dense: Path, curves: Path, tmp_path: Path) -> None:
    line = refused(run("allocate", dense, "--budget", "50%"))
    assert "--by budget needs --sensitivity FILE and --budget 50%" in line
    asked = ("allocate", dense, "--sensitivity", curves)
    assert "--budget is a share such as 50%" in refused(run(*asked, "--budget", "half"))
    assert "--budget is a share such as 50%" in refused(run(*asked, "--budget", "-3%"))
    assert "the least that can be reached is" in refused(run(*asked, "--budget", "1%"))
    steep = json.loads(curves.read_text())
    for layer in steep["layers"].values():
        layer["increase"] = dict.fromkeys(layer["increase"], 1.0)
    (tmp_path / "steep.json").write_text(json.dumps(steep))
    every = ("allocate", dense, "--sensitivity", tmp_path / "steep.json", "--budget", "100%")
    assert "--budget 100% leaves every layer dense" in refused(run(*every))
    line = refused(run(*asked, "--budget", "50%", "--unit", "ms"))
    assert line == "error: --unit is one of parameters, bytes, got 'ms'"
    assert "leave out --pattern" in refused(run(*asked, "--budget", "50%", "-p", "2:4"))
    assert "--by is one of budget, equalize, erk, owl, got 'best'" in refused(
        run("allocate", dense, "--by", "best")
    )
    assert "--by erk needs --pattern" in refused(run("allocate", dense, "--by", "erk"))
    line = refused(run("allocate", dense, "--by", "erk", "-p", "2:4"))
    assert "erk needs a pattern of any sparsity, got 2:4" in line
    assert "ends in .yaml" in refused(run(*asked, "--budget", "50%", "-o", tmp_path / "plan.txt"))
