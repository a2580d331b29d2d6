"""`secateur allocate`: a plan file by shapes, by outliers, and by curves within a budget."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import secateur as sc
from secateur.allocation import (
    Costs,
    Sensitivity,
    allocate,
    costs,
    equalize,
    erk,
    owl,
    read_sensitivity,
    threshold,
)
from secateur.criteria import fisher, taylor
from secateur.integrations.tokens import end_of_text, stored_rows
from secateur.integrations.transformers import load_folder
from tests.cli.shell import ROWS, WIDTH, refused, run, said, same, tokens

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


def test_a_plan_file_holds_zeros_alone(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "sense.json"
    sc.sensitivity(load_folder(dense), ["dense+int4"], lambda model: 1.0).write(out)
    options = ("--sensitivity", out, "--unit", "bytes", "--budget", "50%")
    line = refused(run("allocate", dense, *options, "-o", tmp_path / "plan.yaml"))
    assert "a plan file holds zeros alone, and" in line
    assert "is to be rounded to Int4(group_size=128): measure curves of patterns" in line
    assert not (tmp_path / "plan.yaml").exists()


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
    line = refused(run(*asked, "--budget", "50%", "--unit", "seconds"))
    assert line == "error: --unit is one of parameters, bytes, ms, got 'seconds'"
    line = refused(run(*asked, "--budget", "50%", "--unit", "ms"))
    assert line == "error: --unit ms needs --tokens-per-call, such as --tokens-per-call 1,16,128"
    line = refused(run(*asked, "--budget", "50%", "--tokens-per-call", "1"))
    assert line == "error: --tokens-per-call and --formats go with --unit ms"
    timed = (*asked, "--budget", "50%", "--unit", "ms", "--tokens-per-call")
    assert "numbers of tokens alone" in refused(run(*timed, "1:10,16:1"))
    assert "numbers of at least 1 separated by commas" in refused(run(*timed, "one"))
    assert "leave out --pattern" in refused(run(*asked, "--budget", "50%", "-p", "2:4"))
    assert "--by is one of budget, equalize, erk, owl, threshold, got 'best'" in refused(
        run("allocate", dense, "--by", "best")
    )
    assert "--by erk needs --pattern" in refused(run("allocate", dense, "--by", "erk"))
    line = refused(run("allocate", dense, "--by", "erk", "-p", "2:4"))
    assert "erk needs a pattern of any sparsity, got 2:4" in line
    assert "ends in .yaml" in refused(run(*asked, "--budget", "50%", "-o", tmp_path / "plan.txt"))


def test_a_threshold_over_the_whole_model_is_followed_by_prune(dense: Path, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    data = ("--tokens", tokens(dense, "calibration"), "--rows", 4, "--batch", 2)
    for options, criterion, normalise, floor in (
        ((), sc.magnitude, "lamp", 0.0),
        (("-m", "taylor", *data), taylor, "none", 0.05),
        (("-m", "fisher", *data), fisher, "none", 0.1),
    ):
        asked = ("allocate", dense, "--by", "threshold", "-p", "unstructured:0.7@layer")
        asked += ("--normalise", normalise, "--floor", floor)
        text = said(run(*asked, "-o", plan, *options))
        model = load_folder(dense).float()
        batches = stored_rows(tokens(dense, "calibration"), 4, 2, end_of_text(dense)).batches
        expected = threshold(
            model, "unstructured:0.7@layer", criterion, batches, normalise=normalise, floor=floor
        )
        assert sc.read_plan(plan).layers == expected
        (followed,) = re.findall("next: `secateur (.*) -o OUT`", text)
        said(run(*shlex.split(followed), "-o", out, "--overwrite"))
        report = sc.prune_(model, sc.plan(model, expected), criterion, batches)
        saved = load_folder(out)
        zeros = {n: int((saved.get_submodule(n).weight == 0).sum()) for n in expected}
        assert sum(zeros.values()) == report.zeros == int(0.7 * 20_480 + 0.5)
        assert same(model, out)
        for name, count in zeros.items():
            n = saved.get_submodule(name).weight.numel()
            assert n - count >= floor * n


def test_a_threshold_takes_a_state_dict_and_a_method_of_one_s_own(
    dense: Path, tmp_path: Path
) -> None:
    weights = {"a.weight": torch.randn(16, 8), "b.weight": torch.randn(64, 32)}
    alone, own = tmp_path / "some.safetensors", tmp_path / "own.py"
    save_file(weights, alone)
    own.write_text("def size(weight):\n    return weight.abs()\n")
    asked = ("allocate", alone, "--by", "threshold", "-p", "unstructured:0.6@layer")
    plans = []
    for method in ((), ("-m", f"{own}:size", "--trust-code")):
        plan = tmp_path / "plan.yaml"
        text = said(run(*asked, "--normalise", "lamp", *method, "-o", plan))
        (followed,) = re.findall("next: `secateur (.*) -o OUT`", text)
        said(run(*shlex.split(followed), "-o", tmp_path / "out", "--overwrite"))
        plans.append(sc.read_plan(plan).layers)
    assert plans[0] == plans[1]
    line = refused(run(*asked, "--normalise", "none", "-m", "taylor"))
    assert "is a bare state dict" in line and "or use --method magnitude" in line
    assert "--by threshold needs --normalise none (scores that" in refused(run(*asked))
    assert "or lamp (magnitude), got 'l2'" in refused(run(*asked, "--normalise", "l2"))
    line = refused(run("allocate", dense, "--by", "threshold", "--normalise", "none"))
    assert "--by threshold needs --pattern, such as --pattern unstructured:0.7@layer" in line
    line = refused(run(*asked[:-1], "unstructured:0.6", "--normalise", "none"))
    assert "one budget for a layer, got unstructured:0.6: such as 'unstructured:0.7@layer'" in line


def test_what_a_threshold_empties_is_told_with_a_remedy(tmp_path: Path) -> None:
    weights = {"a.weight": torch.randn(16, 8) / 1e3, "b.weight": torch.randn(64, 32)}
    alone = tmp_path / "some.safetensors"
    save_file(weights, alone)
    asked = ("allocate", alone, "--by", "threshold", "-p", "unstructured:0.6@layer")
    result = run(*asked, "--normalise", "none")
    said(result)
    assert "1 of 2 layers lose all their weights, first a: give --floor 0.05, or" in result.stderr
    result = run(*asked, "--normalise", "none", "--floor", "0.05")
    said(result)
    assert result.stderr == ""


@pytest.mark.parametrize("by", ["budget", "equalize"])
def test_a_budget_of_time_is_measured_here(
    dense: Path, curves: Path, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("allocate", dense, "--sensitivity", curves, "--unit", "ms", "--by", by)
    asked += ("--tokens-per-call", "1,4", "--dtype", "float32")
    line = refused(run(*asked, "--budget", "1,000,000"))
    assert "--budget 1,000,000 leaves every layer dense" in line
    line = refused(run(*asked, "--budget", "1e-9"))
    assert re.search("no choice of these patterns keeps to .* ms|patterns costs less ms than", line)
    # What a clock says is no matter for a test: here a millisecond is a nonzero weight.
    table, seen = costs.parameters(read_sensitivity(curves)), []

    def timed(model: nn.Module, found: Sensitivity, tokens: tuple[int, ...], *_: object) -> Costs:
        seen.append((next(model.parameters()).dtype, tokens))
        return Costs("ms", table.of)

    def together(
        layers: object, choices: Mapping[str, str], tokens: tuple[int, ...], formats: object
    ) -> float:
        return table.total(choices)

    monkeypatch.setattr("secateur.allocation.costs.milliseconds", lambda *a, **_: timed(*a))
    monkeypatch.setattr("secateur.cli.budget.milliseconds", timed)
    monkeypatch.setattr("secateur.allocation.costs._milliseconds_together", together)
    text = said(run(*asked, "--budget", "60%", "-o", tmp_path / "plan.yaml"))
    assert "within 12,288 ms, of 20,480 dense" in text
    assert seen == [(torch.float32, (1, 4))]
    way = allocate if by == "budget" else equalize
    expected = way(read_sensitivity(curves), table, 0.6 * table.dense).patterns
    assert sc.read_plan(tmp_path / "plan.yaml").layers == expected


def test_a_mixture_of_experts_goes_all_the_way(dense: Path, tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        num_local_experts=2, num_experts_per_tok=1, initializer_range=0.3,
    )  # fmt: skip
    folder, curves, plan = (tmp_path / name for name in ("moe", "sense.json", "plan.yaml"))
    MixtralForCausalLM(config).save_pretrained(folder)
    rows = ("--tokens", tokens(dense, "validation"), "--rows", 2)
    text = said(run("sensitivity", folder, *TRIED, *rows, "-o", curves))
    (followed,) = re.findall("next: `secateur (.*) -o plan.yaml`", text)
    text = said(run(*shlex.split(followed), "-o", plan))
    (followed,) = re.findall("next: `secateur (.*) -o OUT`", text)
    said(run(*shlex.split(followed), "-o", tmp_path / "out"))
    layers = sc.read_plan(plan).layers
    assert any(".experts.down_proj." in name for name in layers)
    said(run("check", tmp_path / "out", "--plan", plan))
    within = ("allocate", folder, "--sensitivity", curves, "-o", plan, "--unit")
    result = run(*within, "bytes", "--budget", "80%")
    said(result)
    assert "sensed layers" not in result.stderr
    assert any("experts" in name for name in sc.read_plan(plan).layers)
    result = run(*within, "ms", "--budget", "90%", "--tokens-per-call", 1)
    assert "4 of 8 sensed layers, first model.layers.0.mlp.experts.gate_up_proj.0," in result.stderr
