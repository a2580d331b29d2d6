"""Launch configs of the decode kernel, measured on this device: the fastest for each case."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from multiprocessing import get_context
from random import Random
from statistics import median

import torch
from torch import Tensor

from secateur.core.progress import progress
from secateur.formats.kernels import timing
from secateur.formats.kernels.cubins import cubin, is_kept
from secateur.formats.kernels.decode24.arrange import (
    UNIT_COLUMNS,
    UNIT_ROWS,
    Kind,
    Structure,
    arrange,
)
from secateur.formats.kernels.decode24.config import (
    CLUSTERS_FROM,
    EARLY,
    SM_BYTES,
    WARPGROUPS_ON,
    Case,
    LaunchConfig,
)
from secateur.formats.kernels.decode24.launch_configs import CLUSTERS, launch_configs
from secateur.formats.kernels.decode24.multiply import SOURCE, prepared
from secateur.formats.kernels.launch import Launch, load
from secateur.formats.kernels.nvrtc import arch_of

COLD_BYTES = 10**9  # of weights in rotation: many times any cache
LINKS = 100  # launches in a graph, at least; and each copy of the weights once
MOST_CONFIGS = 100  # of a case; more find a few per cent
AGAIN = 8
STAYS = (0, 2, 4)
TYPICAL = {2: 1}  # tokens to measure a bucket with, where not its most
REPLAYS = 7
LARGEST_ERROR = 8e-3  # of the result against float64, relative; one rounding to bf16 is 1.7e-3
NIBBLES = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)
MASKS = tuple(mask for mask in range(256) if mask.bit_count() == 4)


@dataclass(frozen=True)
class Timed:
    """A launch config, and the microseconds of one launch in a chain with cold weights."""

    config: LaunchConfig
    us: float


def tune(
    cases: Sequence[Case],
    device: torch.device,
    most: int = MOST_CONFIGS,
    workers: int | None = None,
    known: Mapping[Case, Sequence[LaunchConfig]] | None = None,
) -> Iterator[tuple[Case, list[Timed]]]:
    """For each case the launch configs that were measured, fastest first.

    At most `most` configs of a case are tried, drawn with a fixed seed, beside those that are known
    to be good, with several stays. All are compiled first, in parallel. The fastest are measured
    again: a chain can settle in a slow state, so that one measurement is no verdict.

    Raises: ValueError for a GPU before compute capability 9.0, which has one launch config.
    Cost: a GB of device memory; for each config a core-second to compile it, then 0.02 s.
    """
    if torch.cuda.get_device_capability(device) < CLUSTERS_FROM:
        raise ValueError(
            "tuning needs a GPU of compute capability 9.0 or newer: older ones have one config"
        )
    clusters = resident_clusters(device)
    warpgroups = torch.cuda.get_device_capability(device) == WARPGROUPS_ON
    plan = {
        case: _drawn(case, clusters, warpgroups, most, (known or {}).get(case, ()))
        for case in cases
    }
    compile_all(
        [(case, config) for case, drawn in plan.items() for config in drawn], device, workers
    )
    for case, drawn in progress(plan.items(), "tune", unit="case"):
        tokens = TYPICAL.get(case.tokens, case.tokens)
        yield case, _measured(problem(replace(case, tokens=tokens), device), drawn, device)


def _drawn(
    case: Case,
    clusters: Mapping[int, int],
    warpgroups: bool,
    most: int,
    known: Sequence[LaunchConfig],
) -> list[LaunchConfig]:
    found = launch_configs(case, clusters, warpgroups)
    even = [config for config in found if ("WHOLE_STEPS", 1) in config.defines(case, False)]
    drawn = even or found
    Random(0).shuffle(drawn)
    varied = [replace(config, stay=stay) for config in known for stay in (config.stay, *STAYS)]
    return list(dict.fromkeys([*varied, *drawn[:most]]))


def _measured(
    problem: "Problem", drawn: Sequence[LaunchConfig], device: torch.device
) -> list[Timed]:
    """The configs that are right, fastest first; the first few by the median of three chains."""
    timed = list[Timed]()
    for config in drawn:
        try:
            launch = prepared(problem.case.widest, config, device)
            wrong_by = error(problem, launch, device)
            if wrong_by < LARGEST_ERROR:
                timed.append(Timed(config, chain(problem, launch, device)))
            else:
                warnings.warn(
                    f"launch config {config} of {problem.case.weight} at {problem.case.tokens} "
                    f"tokens is wrong by {wrong_by:.1e}, where {LARGEST_ERROR:.0e} is allowed: "
                    "it is left out; please report it",
                    RuntimeWarning,
                    stacklevel=4,
                )
        except RuntimeError as refused:  # more shared memory than this device has
            if "CUDA error" in str(refused):
                raise
    timed.sort(key=lambda one: one.us)
    again = [
        Timed(one.config, median([one.us] + [chain(problem, launch, device) for _ in range(2)]))
        for one in timed[:AGAIN]
        for launch in [prepared(problem.case.widest, one.config, device)]
    ]
    return sorted(again, key=lambda one: one.us) + timed[AGAIN:]


def resident_clusters(device: torch.device) -> dict[int, int]:
    """The number of clusters of each size that the device holds with one CTA on an SM."""
    capability = torch.cuda.get_device_capability(device)
    count = torch.cuda.get_device_properties(device).multi_processor_count
    if capability < CLUSTERS_FROM:
        return {1: count}
    case = Case(Kind.INT4, True, torch.bfloat16, UNIT_ROWS, UNIT_COLUMNS, 1)
    found = {}
    for cluster in CLUSTERS:
        config = LaunchConfig(cluster, 4, 1, 1, 1, 2, EARLY)
        kernel = load(SOURCE, config.defines(case, False), device)
        found[cluster] = kernel.most_clusters(cluster, config.threads, SM_BYTES // 2)
    return found


def compile_all(
    cases: Iterable[tuple[Case, LaunchConfig]], device: torch.device, workers: int | None
) -> None:
    """Compile in parallel processes what the cache of machine code lacks of these configs."""
    arch = arch_of(torch.cuda.get_device_capability(device))
    portable = torch.cuda.get_device_capability(device) < CLUSTERS_FROM
    wanted = {config.defines(case, portable) for case, config in cases}
    if not (defines := sorted(one for one in wanted if not is_kept(SOURCE, one, arch))):
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = pool.map(_compile, [(one, arch) for one in defines], chunksize=4)
        for _ in progress(jobs, "compile", total=len(defines), unit="kernel"):
            pass


def _compile(job: tuple[tuple[tuple[str, int], ...], str]) -> None:
    defines, arch = job
    cubin(SOURCE, defines, arch)


@dataclass(frozen=True)
class Problem:
    """A case's random operands: weights and scales in rotation, and the exact result."""

    case: Case
    x: Tensor
    weights: Tensor
    row_scales: Tensor | None
    exact: Tensor

    def arguments(self, copy: int, y: Tensor) -> tuple[int, ...]:
        weight = self.weights[copy % len(self.weights)]
        scales = 0
        if self.row_scales is not None:
            scales = self.row_scales[copy % len(self.row_scales)].data_ptr()
        case = self.case
        sizes = (case.tokens, case.rows, case.columns)
        return (self.x.data_ptr(), weight.data_ptr(), scales, 0, y.data_ptr(), *sizes)


def problem(case: Case, device: torch.device, cold_bytes: int = COLD_BYTES) -> Problem:
    """Random codes at random places, and activations, from a fixed seed."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.rows, round(case.columns * case.kind.kept))
    metadata, places = _metadata(case, device, generator)
    kind = case.kind.numbers
    if kind is Kind.W16:
        codes = torch.randn(shape, device=device, generator=generator, dtype=torch.float32).to(
            case.dtype
        )
        numbers = codes
    elif kind is Kind.FP8:
        codes = torch.randint(256, shape, device=device, generator=generator).to(torch.uint8)
        codes[codes & 0x7F == 0x7F] = 0
        numbers = codes.view(torch.float8_e4m3fn)
    else:
        most = 7 if kind is Kind.INT4 else 127
        codes = torch.randint(-most, most + 1, shape, device=device, generator=generator).to(
            torch.int8
        )
        numbers = codes
    groups = ceil(case.columns / UNIT_COLUMNS) if case.grouped else 1
    scales = (
        0.5 + torch.rand(case.rows, groups, device=device, generator=generator, dtype=torch.float32)
    ).to(case.dtype) / 64
    units = arrange(case.kind, codes, metadata, scales if case.grouped else None, case.dtype)
    copies = max(2, ceil(cold_bytes / units.nbytes))
    weights = units.expand(copies, *units.shape).contiguous()
    x = torch.randn(
        case.tokens, case.columns, device=device, generator=generator, dtype=torch.float32
    ).to(case.dtype)
    row_scales = None
    if not case.grouped and kind is not Kind.W16:
        row_scales = scales[:, 0].expand(copies, -1).contiguous()
    exact = _exact(x, numbers, places, scales if kind is not Kind.W16 else None, case)
    return Problem(case, x, weights, row_scales, exact)


def _metadata(
    case: Case, device: torch.device, generator: torch.Generator
) -> tuple[Tensor | None, Tensor | None]:
    """Random metadata, and [rows, groups, kept] columns within each group that it keeps."""
    if case.kind.structure is Structure.ALL:
        return None, None
    of_eight = case.kind.structure is Structure.FOUR_OF_EIGHT
    kept = 4 if of_eight else 2
    patterns = torch.tensor(MASKS if of_eight else NIBBLES, device=device)
    groups = (case.rows, case.columns // (2 * kept))
    picks = torch.randint(len(patterns), groups, device=device, generator=generator)
    chosen = patterns[picks].to(torch.uint8)
    if not of_eight:
        metadata = chosen[:, 0::2] | chosen[:, 1::2] << 4
        return metadata, torch.stack((chosen & 3, chosen >> 2), 2)
    columns = [[c for c in range(8) if mask >> c & 1] for mask in MASKS]
    return chosen, torch.tensor(columns, device=device, dtype=torch.uint8)[picks]


def _exact(
    x: Tensor, numbers: Tensor, places: Tensor | None, scales: Tensor | None, case: Case
) -> Tensor:
    """The product in float64, some rows at a time."""
    parts = []
    for start in range(0, case.rows, 2048):
        rows = slice(start, start + 2048)
        dense = numbers[rows].double()
        if places is not None:
            at = places[rows].long()
            kept = dense.view_as(at)
            dense = kept.new_zeros(*kept.shape[:2], 2 * kept.shape[2]).scatter_(2, at, kept)
            dense = dense.flatten(1)
        if scales is not None:
            wide = (
                scales[rows].double().repeat_interleave(UNIT_COLUMNS, 1) if case.grouped else None
            )
            dense = dense * (scales[rows].double() if wide is None else wide[:, : case.columns])
        parts.append(x.double() @ dense.T)
    return torch.cat(parts, 1)


def error(problem: Problem, launch: Launch, device: torch.device) -> float:
    """The relative error of the result by norm; NaN if an element was not written."""
    case = problem.case
    y = torch.full((case.tokens, case.rows), float("nan"), dtype=case.dtype, device=device)
    launch(torch.cuda.current_stream(device).cuda_stream, *problem.arguments(0, y))
    torch.cuda.synchronize(device)
    return float((y.double() - problem.exact).norm() / problem.exact.norm())


def chain(problem: Problem, launch: Launch, device: torch.device) -> float:
    """The microseconds of one launch in a graph of them, each on other weights."""
    y = torch.empty(problem.case.tokens, problem.case.rows, dtype=problem.case.dtype, device=device)

    def call(copy: int) -> None:
        launch(torch.cuda.current_stream(device).cuda_stream, *problem.arguments(copy, y))

    copies = len(problem.weights)
    calls = [partial(call, copy) for copy in range(copies)]
    links = timing.chain(calls, device, max(copies, LINKS))
    return timing.in_turns({"chain": links}, device, REPLAYS)["chain"].median_us
