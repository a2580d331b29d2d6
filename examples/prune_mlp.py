"""Prune a small classifier to 2:4: plan, prune_, check, and what each criterion costs.

The data are 20 classes of three Gaussian clouds each, in 64 inputs of very different scales, as the
activations inside a real network have. That is where Wanda, which weighs a weight by the size of
its input, has something to gain over magnitude. Nothing is retrained here; see train_with_hold.py.
Runs on a CPU in seconds.
"""

import copy

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.model.evaluate import accuracy

CLASSES, CLOUDS, INPUTS, HIDDEN = 20, 3, 64, 256


def data(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels; the clouds are the same for every seed, the points are not."""
    fixed = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, CLOUDS, INPUTS, generator=fixed)
    scales = torch.logspace(-1, 1, INPUTS)[torch.randperm(INPUTS, generator=fixed)]
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows,), generator=draw)
    clouds = torch.randint(CLOUDS, (rows,), generator=draw)
    points = centres[labels, clouds] + 1.2 * torch.randn(rows, INPUTS, generator=draw)
    return points * scales, labels


def trained() -> nn.Module:
    """A dense classifier, trained for 600 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(INPUTS, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, CLASSES),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(600):
        inputs, labels = data(256, seed=step + 1)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    dense = trained()
    test = [data(5000, seed=1_000_001)]
    calibration = [data(256, seed=1_000_002 + i)[0] for i in range(4)]

    plan = sc.plan(dense, "2:4", ignore=["4"])  # the last layer is small and decides: leave it
    print(plan, "\n")

    results = {"dense": accuracy(dense, test)}
    for criterion in (sc.criteria.random, sc.magnitude, sc.wanda):
        model = copy.deepcopy(dense)
        report = sc.prune_(model, plan, criterion, calibration)
        sc.check(model, plan)  # raises unless every group of four keeps at most two
        results[criterion.__name__] = accuracy(model, test)
    print(report, "\n")

    print("accuracy on 5,000 test rows, not retrained:")
    print(" ".join(f"{name}={value:.4f}" for name, value in results.items()))


if __name__ == "__main__":
    main()
