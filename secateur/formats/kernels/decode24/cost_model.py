"""The launch config of a layer that nobody measured: the cheapest by a small cost model.

The cost of a config is a sum of terms, each a quantity that can be read off the config times a
coefficient. The coefficients were fitted to 15,000 timings on an H200, of four layers and 1 to 64
tokens (`python -m bench.run.cuts`). On those the config it chooses takes 6 to 12 % longer, in the
mean, than the best that was measured, and 39 % at the worst; `secateur tune` finds the best.
"""

from functools import cache
from math import ceil
from typing import NamedTuple

from secateur.formats.kernels.decode24.arrange import UNIT_COLUMNS, UNIT_ROWS
from secateur.formats.kernels.decode24.config import EARLY, RELEASED, Case, LaunchConfig
from secateur.formats.kernels.decode24.launch_configs import CLUSTERS, launch_configs

# Clusters of 4 and 8 leave SMs over where a GPC's SMs are no multiple: 30 of 33 and 15 of 16 places
# are used on an H200, which this fraction stands for on other devices too.
LARGE_CLUSTERS = 0.91
KB = 1e3


class LaunchCosts(NamedTuple):
    """Microseconds for a kernel, for a KB that a CTA moves, for a step; see `quantities`."""

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


COSTS = {  # by the most tokens of a case: python -m bench.run.cuts
    2: LaunchCosts(
        1.5, 0.0188, 0.0207, 0.0, 0.0016, 0.00583, 0.0304, 0.166,
        0.00823, 0.309, 0.0, 0.0, 0.0, 0.0,
    ),
    8: LaunchCosts(
        1.28, 0.0185, 0.0175, 0.0116, 0.00131, 0.0354, 0.0375, 0.161,
        0.00296, 0.399, 0.185, 0.502, 0.0, 0.0,
    ),
    16: LaunchCosts(
        1.7, 0.0144, 0.00997, 0.0139, 0.0, 0.0458, 0.0954, 0.00475,
        0.00417, 0.457, 0.0505, 0.773, 0.0, 0.0,
    ),
    64: LaunchCosts(
        1.26, 0.00719, 0.00576, 0.011, 0.00686, 0.0902, 0.154, 0.037,
        0.00269, 0.251, 0.251, 0.122, 0.98, 0.0,
    ),
}  # fmt: skip


@cache  # looking through all launch configs takes a tenth of a second
def by_cost_model(case: Case, multiprocessors: int, warpgroups: bool = True) -> LaunchConfig:
    """The cheapest launch config of a case, for a device with clusters and this number of SMs."""
    fitting = {1: multiprocessors}
    for size in CLUSTERS[1:]:
        whole = multiprocessors // size
        fitting[size] = whole if size == 2 else max(1, int(whole * LARGE_CLUSTERS))
    found = launch_configs(case, fitting, warpgroups)
    return min(found, key=lambda config: (expected_us(case, config), str(config)))


def expected_us(case: Case, config: LaunchConfig) -> float:
    """The microseconds that the model predicts for a launch config."""
    costs = next(costs for most, costs in COSTS.items() if case.tokens <= most)
    return sum(cost * amount for cost, amount in zip(costs, quantities(case, config), strict=True))


def quantities(case: Case, config: LaunchConfig) -> tuple[float, ...]:
    """The quantities of a config that the fields of `LaunchCosts` multiply, in their order."""
    units = ceil(case.units / config.cluster)  # of columns, in a CTA
    row_bytes = 4 * 2 if case.pairs == 1 else 4 * 8 * min(case.token_tiles, 2)
    parts = ceil(config.tiles_of_cluster * max(1, case.token_tiles // 2) / config.cluster)
    sums = 2 * parts * config.cluster * config.splits * UNIT_ROWS * row_bytes / KB
    best_trigger = EARLY if case.tokens <= 2 else RELEASED
    return (
        1.0,
        config.tiles_of_cluster * units * case.unit_bytes / KB,
        case.tokens * units * 2 * UNIT_COLUMNS / KB,
        sums,
        sums * (config.cluster - 1) / config.cluster,
        float(config.tiles * ceil(case.units / (config.cluster * config.splits))),
        float(config.steps(case)),
        config.steps(case) / config.stages,
        float(config.tiles_of_cluster * units * case.token_tiles),
        float(config.blocks(case) == 1),
        float(config.trigger != best_trigger),
        float(config.x_stages > 0),
        float(config.warpgroup),
        float(case.tokens <= 2 and not config.ahead),
    )
