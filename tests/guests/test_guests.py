"""Guests that the library has never seen pass every verb, the shell, plans, files and the report.

Nothing names a pattern, a criterion or an algorithm outside its own file, so a new one is a file
and an export line; `exported` stands in for the line.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import secateur as sc
from secateur import criteria, reconstruct
from secateur.allocation import allocate, erk
from secateur.allocation.costs import parameters
from secateur.cli import app
from secateur.formats import SparseLinear
from secateur.model.evaluate import compare
from secateur.prune import permute_
from secateur.report import write_html
from secateur.report.inspection import inspect
from secateur.train.schedules import linear
from tests.guests.algorithm import rescaled
from tests.guests.criterion import softened
from tests.guests.pattern import Pairs
from tests.models import Decoder

HALF = Pairs(0.5)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the three export lines."""
    module = __import__("secateur.patterns.parse", fromlist=["PATTERNS"])
    monkeypatch.setattr(module, "PATTERNS", (*module.PATTERNS, Pairs))
    for room, guest in ((criteria, softened), (reconstruct, rescaled)):
        monkeypatch.setattr(room, guest.__name__, guest, raising=False)
        monkeypatch.setattr(room, "__all__", [*vars(room)["__all__"], guest.__name__])


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder().eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(20, (4, 12), generator=generator) for _ in range(4)]


def zeros(model: nn.Module, plan: sc.Plan) -> list[Tensor]:
    modules = dict(model.named_modules())
    return [modules[name].get_parameter("weight") == 0 for name in plan.layers]


METHODS: dict[str, Any] = {
    "softened": softened,
    "rescaled": rescaled,
    "refit(softened)": sc.refit(softened),
    "sparsegpt": sc.sparsegpt,
    "alps": sc.alps,
    "blockwise(rescaled)": sc.blockwise(rescaled),
    "best": sc.best,
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_the_guests_pattern(name: str) -> None:
    pruned, plan = model(), sc.plan(model(), HALF)
    verb: Any = sc.prune_ if name == "softened" else sc.reconstruct_
    report = verb(pruned, plan, METHODS[name], batches())
    assert set(sc.check(pruned, plan).values()) == {0.5}
    for found in zeros(pruned, plan):
        pairs = found.unflatten(1, (-1, 2))
        assert torch.equal(pairs.all(-1), pairs.any(-1))
    assert report.method == {"best": "blockwise(alps)"}.get(name, name)
    assert {row.pattern for row in report.layers} == {"pairs:0.5"}


def test_swap_says_that_pairs_are_dropped_together() -> None:
    with pytest.raises(ValueError, match=r"swap exchanges single weights, pairs:0\.5 drops them"):
        sc.reconstruct_(model(), HALF, sc.swap(softened), batches())
    with pytest.raises(ValueError, match="is no N:M pattern"):
        permute_(model(), HALF, softened, batches())


def test_training_holds_and_raises_the_guests_sparsity() -> None:
    trained, plan = model(), sc.plan(model(), HALF)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    rule = sc.gradual(plan, linear(0.5, 0, 4), every=1, criterion=sc.magnitude)
    shares = []
    with sc.hold(trained, optimizer, rule=rule):
        for _ in range(4):
            trained(batches()[0]).square().mean().backward()
            optimizer.step()
            found = torch.cat([z.flatten() for z in zeros(trained, plan)])
            shares.append(round(float(found.float().mean()), 3))
    assert shares == [0.125, 0.25, 0.375, 0.5]
    sc.check(trained, plan)


def test_budgets_and_formulas_take_the_guest(exported: None) -> None:
    dense = model()
    found = erk(dense, HALF)
    assert {type(pattern) for pattern in found.values()} == {Pairs}
    sensed = sc.sensitivity(
        dense,
        ["pairs:0.25", HALF],
        lambda m: compare(m, dense, batches()).kl,
        criterion=softened,
        batches=batches(),
    )
    costs = parameters(sensed)
    allocation = allocate(sensed, costs, budget=0.6 * sum(c["dense"] for c in costs.of.values()))
    assert {type(pattern) for pattern in allocation.patterns.values()} == {Pairs}


def test_plans_files_formats_and_the_page_show_it(exported: None, tmp_path: Path) -> None:
    pruned = model()
    plan = sc.plan(pruned, HALF)
    plan.write(tmp_path / "plan.yaml")
    assert sc.read_plan(tmp_path / "plan.yaml").layers == plan.layers
    report = sc.prune_(pruned, plan, softened, batches())
    sc.save(pruned, tmp_path / "saved", plan=plan, reports=[report])
    loaded = sc.load(tmp_path / "saved", model())
    sc.check(loaded, plan)
    write_html(tmp_path / "page.html", title="Guest", plan=plan, prune=report, model=pruned)
    page = (tmp_path / "page.html").read_text()
    assert "pairs:0.5" in page and "softened" in page
    assert "50" in str(inspect(pruned))
    packed = copy.deepcopy(pruned)
    sc.pack_(packed, "bitmap")
    assert any(isinstance(m, SparseLinear) for m in packed.modules())
    torch.testing.assert_close(packed(batches()[0]), pruned(batches()[0]))


def test_the_shell_takes_all_three(exported: None, tmp_path: Path) -> None:
    weights = {f"l{i}.weight": torch.randn(16, 12) for i in range(2)}
    save_file(weights, tmp_path / "dense.safetensors")

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    dense, out = tmp_path / "dense.safetensors", tmp_path / "out"
    assert "pairs:0.5" in run("plan", dense, "-p", "pairs:0.5")
    run("prune", dense, "-o", out, "-p", "pairs:0.5", "--method", "magnitude")
    assert "pairs:0.5" in run("check", out)
    (file,) = out.glob("*.safetensors")
    assert all(
        (t.unflatten(1, (-1, 2)) == 0).all(-1).float().mean() == 0.5
        for t in load_file(file).values()
    )
    refused = CliRunner().invoke(
        app, ["prune", str(dense), "-o", str(out), "-p", "pairs:0.5", "--method", "rescaled"]
    )
    assert refused.exit_code == 2 and "calibration" in refused.stderr
