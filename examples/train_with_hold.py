"""Train with zeros: prune once and retrain with `hold`, or raise the sparsity gradually.

Both roads give the same trained classifier 75 % zeros (1:4) and the same number of further steps.
Without `hold`, the very first step fills the zeros in again; the last run shows it. The data are 20
classes of three Gaussian clouds each. Runs on a CPU in seconds.
"""

import copy

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.model.evaluate import accuracy
from secateur.train.schedules import cubic

CLASSES, CLOUDS, INPUTS, HIDDEN = 20, 3, 64, 256
STEPS = 300  # after the dense model is trained, for each road


def data(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels; the clouds are the same for every seed, the points are not."""
    centres = torch.randn(CLASSES, CLOUDS, INPUTS, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows,), generator=draw)
    clouds = torch.randint(CLOUDS, (rows,), generator=draw)
    return centres[labels, clouds] + 1.2 * torch.randn(rows, INPUTS, generator=draw), labels


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """A training loop that knows nothing of sparsity."""
    for step in steps:
        inputs, labels = data(256, seed=step)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Linear(INPUTS, HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, CLASSES),
    )  # fmt: skip
    train(dense, torch.optim.AdamW(dense.parameters(), lr=2e-3), range(1, 601))
    test = [data(5000, seed=1_000_001)]
    plan = sc.plan(dense, "1:4", ignore=["4"])
    further = range(601, 601 + STEPS)

    once = copy.deepcopy(dense)
    sc.prune_(once, plan, sc.magnitude)
    results = {"dense": accuracy(dense, test), "pruned": accuracy(once, test)}
    optimizer = torch.optim.AdamW(once.parameters(), lr=1e-3)
    with sc.hold(once, optimizer):
        train(once, optimizer, further)
    results["retrained"] = accuracy(once, test)
    sparsity = sc.check(once, plan)  # raises if a zero was lost

    slowly = copy.deepcopy(dense)
    optimizer = torch.optim.AdamW(slowly.parameters(), lr=1e-3)
    schedule = cubic(final=0.75, begin=0, end=STEPS // 2)
    with sc.hold(slowly, optimizer, rule=sc.gradual(plan, schedule, every=15)):
        train(slowly, optimizer, further)
    results["gradual"] = accuracy(slowly, test)
    sc.check(slowly, plan)

    train(once, torch.optim.AdamW(once.parameters(), lr=1e-3), range(1, 2))  # one step, not held
    left = float((once[0].weight == 0).float().mean())
    print(f"zeros in layer 0: {sparsity['0']:.2%} while held, {left:.2%} one step later")
    print(" ".join(f"{name}={value:.4f}" for name, value in results.items()))


if __name__ == "__main__":
    main()
