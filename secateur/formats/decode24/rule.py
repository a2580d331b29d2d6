"""A cut for a layer that nobody measured: the one that a small cost model likes best.

The model is a sum of what a cut costs, each term a quantity that can be read off the cut. Its
coefficients were fitted to 4,200 timings on an H200, of four layers and 1 to 64 tokens
(`python -m bench.cuts`). On those the cut it chooses takes 4 to 7 % longer, in the mean, than the
best that was measured, and 40 % at the worst; `secateur tune` finds that one.
"""

from math import ceil
from typing import NamedTuple

from secateur.formats.decode24.arrange import UNIT_COLUMNS, UNIT_ROWS
from secateur.formats.decode24.config import AFTER_X, EARLY, Case, Config
from secateur.formats.decode24.cuts import CLUSTERS, cuts

# Clusters of 4 and 8 leave SMs over where a GPC's SMs are no multiple: 30 of 33 and 15 of 16 places
# are used on an H200, which this fraction stands for on other devices too.
LARGE_CLUSTERS = 0.91
KB = 1e3


class Costs(NamedTuple):
    """Microseconds: of a kernel, of a KB that a CTA moves, of a step; see `quantities`."""

    kernel: float
    weight: float
    activations: float
    sums: float
    remote_sums: float
    unit_of_warp: float
    step: float
    turn: float
    multiplication: float
    alone: float
    trigger: float
    streamed: float
    warpgroup: float
    behind: float


COSTS = {  # for up to so many tokens: python -m bench.cuts
    2: Costs(
        1.2, 0.0208, 0.0267, 0.0, 0.00616, 0.022, 0.0297,
        0.0391, 0.00624, 0.361, 0.00299, 0.0, 0.0, 0.168,
    ),
    8: Costs(
        1.59, 0.019, 0.0126, 0.0, 0.0151, 0.0474, 0.059,
        0.0163, 0.00299, 0.391, 0.398, 0.249, 0.135, 0.0,
    ),
    16: Costs(
        1.51, 0.0142, 0.0116, 0.0122, 0.00686, 0.0664, 0.0889,
        0.0, 0.00322, 0.435, 0.157, 0.769, 0.0, 0.0,
    ),
    64: Costs(
        0.953, 0.0063, 0.00615, 0.0075, 0.0206, 0.102, 0.154,
        0.0293, 0.00281, 0.291, 0.0, 0.261, 1.11, 0.0,
    ),
}  # fmt: skip


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
    return sum(cost * amount for cost, amount in zip(costs, quantities(case, cut), strict=True))


def quantities(case: Case, cut: Config) -> tuple[float, ...]:
    """What each of `Costs` multiplies, in their order."""
    units = ceil(case.units / cut.cluster)  # of columns, in a CTA
    row_bytes = 4 * 2 if case.pairs == 1 else 4 * 8 * min(case.token_tiles, 2)
    parts = ceil(cut.tiles_of_cluster * max(1, case.token_tiles // 2) / cut.cluster)
    sums = 2 * parts * cut.cluster * cut.splits * UNIT_ROWS * row_bytes / KB
    best_trigger = EARLY if case.tokens <= 2 else AFTER_X
    return (
        1.0,
        cut.tiles_of_cluster * units * case.unit_bytes / KB,
        case.tokens * units * 2 * UNIT_COLUMNS / KB,
        sums,
        sums * (cut.cluster - 1) / cut.cluster,
        float(cut.tiles * ceil(case.units / (cut.cluster * cut.splits))),
        float(cut.steps(case)),
        cut.steps(case) / cut.stages,
        float(cut.tiles_of_cluster * units * case.token_tiles),
        float(cut.blocks(case) == 1),
        float(cut.trigger != best_trigger),
        float(cut.x_stages > 0),
        float(cut.warpgroup),
        float(case.tokens <= 2 and not cut.ahead),
    )
