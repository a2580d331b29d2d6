"""The launch configs of a case: those to measure, or to choose from by the cost model."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from math import ceil

from secateur.formats.kernels.decode24.arrange import Kind
from secateur.formats.kernels.decode24.config import (
    AFTER_INPUTS,
    AFTER_LOOP,
    EARLY,
    RELEASED,
    RESERVED_BYTES,
    SM_BYTES,
    Case,
    LaunchConfig,
)

MOST_BYTES = 227 * 1024  # of shared memory that a CTA may ask for on sm_90 and sm_100
# Before sm_90: nothing that needs it, and shared memory for the least of those devices (99 KB). It
# has been run compiled for sm_90 only.
PORTABLE = LaunchConfig(1, 4, 1, 1, 1, 3, AFTER_INPUTS, 3)
CLUSTERS = (1, 2, 4, 8)
WASTES = (
    1.36,
    2.0,
    8.0,
)  # how much more than its share an SM may do; the first that leaves a launch config
COARSE = 1.34  # times that where rows go by 64, for warpgroups
MOST_WAVES = 64
MOST_STAGES = 8
LEAST_SHARE = 0.5  # row tiles of an SM; layers smaller than that cannot fill the device


def launch_configs(case: Case, clusters: Mapping[int, int], warpgroups: bool) -> list[LaunchConfig]:
    """Every config worth measuring; `clusters` has how many of each size the device holds at once.

    In as few waves as can be; every SM with about its share of rows and every warp with its share
    of columns; shared memory either whole or half of an SM's, so that a CTA of the next kernel can
    stand beside this one. From 32 tokens on by warpgroups, where there are any.
    """
    for waste, waves in product(WASTES, (1, 2, 4, MOST_WAVES)):
        found = list(_launch_configs(case, clusters, warpgroups, waste, waves))
        if found:
            return found
    raise AssertionError(f"no launch config for {case}")


def _launch_configs(
    case: Case, clusters: Mapping[int, int], warpgroups: bool, waste: float, waves: int
) -> Iterator[LaunchConfig]:
    warpgroups = warpgroups and not case.kind.on_dense_cores
    streams = (0,) if case.tokens <= 8 else (0, 3) if case.tokens <= 32 else (0, 3, 4)
    groups = (0,) if not warpgroups or case.tokens <= 2 else (1,) if case.tokens > 16 else (0, 1)
    share = max(LEAST_SHARE, case.row_tiles / (clusters[1] * waves))
    for warpgroup, x_stages, tiles in product(groups, streams, range(1, 9)):
        allowed = waste * share * (COARSE if warpgroup else 1)
        step = 4 if warpgroup else 1
        for cluster, count in clusters.items():
            for warp_rows in range(step, 21, step):
                rows = warp_rows * tiles
                if rows / cluster > allowed or ceil(case.row_tiles / rows) > count * waves:
                    continue
                for splits in (1, 2, 3, 4, 6, 8, 12, 16):
                    part = LaunchConfig(
                        cluster, warp_rows, splits, tiles, 1, 2, AFTER_INPUTS, x_stages, warpgroup
                    )
                    yield from _deep(case, part, waste)


def _deep(case: Case, part: LaunchConfig, waste: float) -> Iterator[LaunchConfig]:
    """The partial config with every sensible depth of its ring and moment of its trigger."""
    slices = part.cluster * part.splits
    if not 4 <= part.warps <= (20 if part.warpgroup else 16):
        return
    if ceil(case.units / slices) * slices > waste * case.units:
        return
    few = case.tokens <= 2
    triggers = (
        (EARLY, RELEASED) if few else (RELEASED, AFTER_INPUTS, AFTER_LOOP)[: 2 + (case.tokens > 16)]
    )
    wide = case.kind.numbers is Kind.W16
    for units in (1, 2, 4) if case.tokens <= 8 and not wide else (1, 2):
        if part.x_stages and units * part.splits > 4:
            continue
        for stages in _depths(case, replace(part, units=units)):
            for trigger in triggers:
                for ahead in (0, 1) if few and not wide else (0,):
                    config = replace(part, units=units, stages=stages, trigger=trigger, ahead=ahead)
                    if config.registers(case) <= config.most_registers(config.blocks(case)):
                        yield config.with_stay(case)


def _depths(case: Case, part: LaunchConfig) -> list[int]:
    """The most stages that fit in half of an SM's shared memory, and in all of it."""
    found = set[int]()
    deep = [replace(part, stages=stages) for stages in range(1, MOST_STAGES + 1)]
    for limit in (SM_BYTES // 2 - RESERVED_BYTES, MOST_BYTES):
        fitting = [
            config.stages
            for config in deep
            if config.stages <= part.steps(case)
            and config.shared_bytes(case) + config.static_bytes <= limit
        ]
        found |= set(fitting[-1:])
    return sorted(found)
