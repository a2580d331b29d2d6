"""Block sparsity that is faster, where it is: prune in tiles, measure, keep what wins.

A stack of large linear layers loses 90 % of its 64 x 64 tiles. `accelerate_` then times every layer
on this machine, dense and packed, for the numbers of tokens that you name, and changes only those
that are faster at each of them. The table is what it measured, losing rows included. The layers are
random: speed does not depend on what the weights say, and accuracy is not the subject here.
Runs on a CPU in seconds.
"""

import torch
from torch import nn

import secateur as sc

WIDTH, HIDDEN = 1024, 4096


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, 64)
    )
    blocks = sc.plan(model, "block:64x64@0.9", ignore=["3"])
    sc.prune_(model, blocks, sc.magnitude)
    x = torch.randn(16, WIDTH)
    with torch.no_grad():
        dense_output = model(x)

    report = sc.accelerate_(model, tokens=(1, 16, 128))
    print(report, "\n")

    with torch.no_grad():
        difference = float((model(x) - dense_output).abs().max() / dense_output.abs().max())
    kept = sum(type(layer) is nn.Linear for layer in model)
    print(f"sparse={len(report.sparse)} dense={kept} largest_difference={difference:.2e}")


if __name__ == "__main__":
    main()
