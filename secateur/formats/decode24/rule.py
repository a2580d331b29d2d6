"""A cut for a layer that nobody measured: the one that a small cost model likes best.

The model is a sum of what a cut costs, each term a quantity that can be read off the cut. Its
coefficients were fitted (least squares, none negative) to 3,600 timings on an H200, of 1 to 64
tokens and four number types. On those the cut it chooses takes 4 to 9 % longer, in the mean over
layers, than the best that was measured; `secateur tune` finds that one. See docs/log.
"""

from dataclasses import dataclass
from math import ceil

from secateur.formats.decode24.config import AFTER_X, EARLY, Case, Config
from secateur.formats.decode24.cuts import CLUSTERS, cuts

# Clusters of 4 and 8 leave SMs over where a GPC's SMs are no multiple: 30 of 33 and 15 of 16 places
# are used on an H200, which this fraction stands for on other devices too.
LARGE_CLUSTERS = 0.91


@dataclass(frozen=True)
class Costs:
    """Microseconds: of a kernel, of a KB that a CTA moves, of a step; see `expected_us`."""

    kernel: float
    weight: float
    activations: float
    sums: float
    remote_sums: float
    unit_of_warp: float
    step: float
    multiplication: float
    alone: float
    trigger: float
    streamed: float
    warpgroup: float


COSTS = {  # for up to so many tokens
    2: Costs(1.35, 0.0211, 0.0218, 0.0, 0.0198, 0.0190, 0.0290, 0.0064, 0.36, 0.0, 0.0, 0.0),
    8: Costs(1.49, 0.0187, 0.0142, 0.0, 0.0387, 0.0483, 0.0713, 0.0029, 0.39, 0.42, 0.18, 0.20),
    16: Costs(1.32, 0.0140, 0.0107, 0.0297, 0.0122, 0.0636, 0.106, 0.0035, 0.50, 0.25, 0.81, 0.0),
    64: Costs(0.87, 0.0065, 0.0063, 0.0112, 0.0432, 0.100, 0.137, 0.0031, 0.24, 0.0, 0.41, 1.25),
}


def by_rule(case: Case, multiprocessors: int, warpgroups: bool = True) -> Config:
    """The cheapest cut of a case, for a device with clusters and so many SMs."""
    fitting = {1: multiprocessors}
    for size in CLUSTERS[1:]:
        whole = multiprocessors // size
        fitting[size] = whole if size == 2 else max(1, int(whole * LARGE_CLUSTERS))
    found = cuts(case, fitting, warpgroups)
    return min(found, key=lambda cut: (expected_us(case, cut), str(cut)))


def expected_us(case: Case, cut: Config) -> float:
    """What the model says of a cut."""
    costs = next(costs for most, costs in COSTS.items() if case.tokens <= most)
    units = ceil(case.units / cut.cluster)  # of columns, in a CTA
    row_bytes = 4 * 2 if case.pairs == 1 else 4 * 8 * min(case.token_tiles, 2)
    parts = ceil(cut.tiles_of_cluster * max(1, case.token_tiles // 2) / cut.cluster)
    sums = 2 * parts * cut.cluster * cut.splits * 16 * row_bytes / 1e3
    best_trigger = EARLY if case.tokens <= 2 else AFTER_X
    return (
        costs.kernel
        + costs.weight * cut.tiles_of_cluster * units * case.unit_bytes / 1e3
        + costs.activations * case.tokens * units * 256 / 1e3
        + costs.sums * sums
        + costs.remote_sums * sums * (cut.cluster - 1) / cut.cluster
        + costs.unit_of_warp * cut.tiles * ceil(case.units / (cut.cluster * cut.splits))
        + costs.step * cut.steps(case)
        + costs.multiplication * cut.tiles_of_cluster * units * case.token_tiles
        + costs.alone * (cut.blocks(case) == 1)
        + costs.trigger * (cut.trigger != best_trigger)
        + costs.streamed * (cut.x_stages > 0)
        + costs.warpgroup * cut.warpgroup
    )
