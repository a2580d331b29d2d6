"""The bench of training from scratch: every way takes the same steps and ends with its zeros."""

from pathlib import Path

import torch
from torch import nn

import secateur as sc
from bench.run import from_scratch
from bench.tables.pages import TABLES
from tests.bench.rows import rows_of


def test_every_way_trains_the_same_model_on_the_same_bytes(tmp_path: Path) -> None:
    from_scratch.main(["--steps", "4", "--seeds", "3", "--output", str(tmp_path)])
    rows = rows_of(tmp_path, "from-scratch")
    assert [row["way"] for row in rows] == list(from_scratch.WAYS)
    assert {(row["seed"], row["steps"]) for row in rows} == {("3", "4")}
    losses = {row["way"]: float(row["loss"]) for row in rows}
    # Four steps from uniform, ln 256 = 5.55, and weights that are dropped make a difference.
    assert all(4 < loss < 5.6 for loss in losses.values())
    assert losses["dense"] not in (losses["STE"], losses["zeros from the start, held"])
    table = TABLES["from-scratch"](tmp_path)
    assert f"| dense | {losses['dense']:.3f} | - | 0 |" in table
    above = losses["S-STE"] - losses["dense"]
    assert f"| S-STE | {losses['S-STE']:.3f} | {above:+.3f} to {above:+.3f} |" in table


def test_the_first_weights_and_batches_are_those_of_the_seed() -> None:
    data = torch.randint(256, (4096,), generator=torch.Generator().manual_seed(0))
    seen: list[list[float]] = []

    def watched(model: nn.Module, plan: sc.Plan, optimizer: torch.optim.Optimizer, steps: int):  # type: ignore[no-untyped-def]
        seen.append([float(p.detach().double().sum()) for p in model.parameters()])
        return from_scratch.WAYS["dense"](model, plan, optimizer, steps)

    ends = [from_scratch.trained(watched, seed, 2, data)[0] for seed in (1, 1, 2)]
    assert seen[0] == seen[1] != seen[2]
    weights = [end.head.weight for end in ends]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_learning_rate_rises_and_falls_to_a_tenth() -> None:
    rates = [from_scratch.rate(step, 100) for step in range(101)]
    assert max(rates) == rates[5] == 1.0 and abs(rates[100] - 0.1) < 1e-12
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
