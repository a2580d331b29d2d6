"""A criterion of your own: one function, used like the library's.

A criterion takes the weight and returns a score of the same shape; the larger score is kept. The
names of its other parameters say which statistics of the calibration data it needs, and parameters
with a default are options. `softened` lies between magnitude (power 0) and Wanda (power 1).
Runs on a CPU in seconds.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import secateur as sc


def softened(weight: Tensor, input_norm: Tensor, *, power: float = 0.5) -> Tensor:
    """|W_ij| * ||x_j||_2^power: `input_norm`, by its name, is gathered from the batches."""
    return weight.abs() * input_norm**power


def main() -> None:
    torch.manual_seed(0)
    # A random network on inputs of very different scales. Its outputs are what pruning should keep:
    # no training and no labels are needed to see which criterion disturbs them least.
    dense = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    scales = torch.logspace(-1, 1, 256)[torch.randperm(256)]
    calibration = [torch.randn(128, 256) * scales for _ in range(4)]
    test = torch.randn(1024, 256) * scales
    plan = sc.plan(dense, "unstructured:0.6")

    def error(criterion: Callable[..., Tensor]) -> float:
        """||y' - y||^2 / ||y||^2 on the test inputs after pruning with this criterion."""
        model = copy.deepcopy(dense)
        sc.prune_(model, plan, criterion, calibration)
        with torch.no_grad():
            y = dense(test)
            return float((model(test) - y).square().sum() / y.square().sum())

    results = {"magnitude": error(sc.magnitude)}
    for power in (0.5, 1.0, 1.5):
        results[f"softened_{power}"] = error(partial(softened, power=power))
    results["wanda"] = error(sc.wanda)

    # A name that is no statistic is an error before anything is touched.
    try:
        sc.prune_(dense, plan, lambda weight, curvature: weight, calibration)
    except ValueError as refused:
        print(f"refused: {refused}\n")

    print("share of the output's energy lost at 60 % zeros:")
    print(" ".join(f"{name}={value:.4f}" for name, value in results.items()))


if __name__ == "__main__":
    main()
