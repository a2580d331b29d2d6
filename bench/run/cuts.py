"""The coefficients of the decode kernel's cost model, fitted anew to timings of launch configs.

    python -m bench.run.cuts

Reads bench/results/rule_*.csv (device, weight, tokens, launch config, microseconds) and prints, for
each bucket of tokens, the coefficients of `secateur.formats.kernels.decode24.cost_model` and how
much longer the configs take that the model chooses than the best that were measured. Least squares
of the relative error with no coefficient negative; configs near the best count most. The timings
are of versions of the kernel on the way to the present one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from bench.lib.results import RESULTS, read
from secateur.formats.kernels.decode24.arrange import Kind
from secateur.formats.kernels.decode24.config import Case, LaunchConfig
from secateur.formats.kernels.decode24.cost_model import COSTS, LaunchCosts, quantities

OLDER = 9  # commas in a config that was measured before configs had a stay
SWEEPS = 3000  # of the descent; the coefficients have settled long before

Timings = Sequence[tuple[Case, LaunchConfig, float]]


def timings(results: Path) -> Timings:
    """Every case, launch config and time of the files."""
    found = []
    for path in sorted(results.glob("rule_*.csv")):
        for row in read(path):
            numbers, _, shape = row["weight"].partition(" ")
            kind, _, group = numbers.partition("/")
            rows, columns = map(int, shape.split("x"))
            weight = (Kind[kind.upper()], bool(group), torch.bfloat16, rows, columns)
            case = Case(*weight, int(row["tokens"]))
            config = row["cut"]
            if config.count(",") == OLDER:
                config = f"{config},0"
            found.append((case, LaunchConfig.parse(config), float(row["us"])))
    return found


def fit(chosen: Timings) -> LaunchCosts:
    """The coefficients that explain these timings best."""
    best = fastest(chosen)
    weight = np.array([(best[case] / us) ** 2 / us for case, _, us in chosen])
    terms = np.array([quantities(case, config) for case, config, _ in chosen]) * weight[:, None]
    target = np.array([us for *_, us in chosen]) * weight
    gram, moment = terms.T @ terms, terms.T @ target
    solution = np.zeros(len(moment))
    for _ in range(SWEEPS):
        for j in np.flatnonzero(gram.diagonal()):
            step = (moment[j] - gram[j] @ solution) / gram[j, j]
            solution[j] = max(0.0, solution[j] + step)
    return LaunchCosts(*(float(f"{value:.3g}") for value in solution))


def fastest(chosen: Timings) -> Mapping[Case, float]:
    """The best time of each case."""
    best: dict[Case, float] = {}
    for case, _, us in chosen:
        best[case] = min(us, best.get(case, us))
    return best


def excess(chosen: Timings, costs: LaunchCosts) -> list[float]:
    """For each case, the time of the model's choice over the best; 1 is no loss."""
    best = fastest(chosen)
    choice: dict[Case, tuple[float, float]] = {}
    for case, config, us in chosen:
        expected = float(np.dot(quantities(case, config), costs))
        if case not in choice or expected < choice[case][0]:
            choice[case] = expected, us
    return [us / best[case] for case, (_, us) in choice.items()]


def main() -> None:
    least = 0
    everything = timings(RESULTS)
    for most in COSTS:
        chosen = [timing for timing in everything if least < timing[0].tokens <= most]
        costs = fit(chosen)
        losses = excess(chosen, costs)
        print(f"{most}: {costs}")
        print(
            f"    {len(chosen)} timings; longer by {fmean(losses) - 1:.1%}, {max(losses) - 1:.0%}"
        )
        least = most


if __name__ == "__main__":
    main()
