"""What the GPU benches of single layers share: candidates, cold chains, and a row for each.

The chains and their timing are `secateur.formats.kernels.timing`, which says why. Here a chain
rotates over copies of 1.3 GB together, and lasts about 3 ms, or one rotation where that takes
longer.
"""

import argparse
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from time import monotonic

import torch
from torch import Tensor, nn

from bench.lib import command
from bench.lib.rows import Row, append
from bench.lib.shapes import layers_of
from secateur.accelerate.candidates import first_line
from secateur.formats import SparseLinear, parse_format
from secateur.formats.kernels import timing
from secateur.formats.kernels.timing import Chain, Timing, VariantFailed, in_turns
from secateur.formats.linear import REFERENCE
from secateur.formats.pack import packed_linear

COLD_BYTES = 1_300_000_000  # of all copies together: 20x the L2 cache of an H200
MOST_LAUNCHES = 260  # what fills COLD_BYTES with the smallest layer in int4
CHAIN_BYTES = 13_500_000_000  # a chain reads no more: 3 ms at 4.5 TB/s
CHAIN_OPERATIONS = 3_000_000_000_000  # nor computes more: 3 ms at 1000 TFLOP/s
ROUNDS = 15
CHECKED = 128  # tokens, spread over all: one in every tile of 128 up to 16384
WRONG = 0.02  # relative error above which a result counts as wrong; bf16 rounding is 0.002
REASON = 160  # characters of a reason that a row carries
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, OSError, MemoryError)
PATIENCE = 0.5  # seconds that an answer about the clocks may take beyond the measurement
CLOCKS = {"sm_mhz": "clocks.sm", "celsius": "temperature.gpu", "watts": "power.draw"}

Run = Callable[..., Tensor]
Tuned = tuple[Sequence[Run], str]


def as_made(runs: Sequence[Run], x: Tensor) -> Tuned:
    """The copies as they are, and nothing to say about them: `tune` of most candidates."""
    return runs, ""


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer.

    `make()` is a copy with weights of its own, of which a launch reads `nbytes`; `exact(x)` is the
    result in float64 for the very weight that they stand for. `tune(runs, x)` prepares the copies
    for one input and says how. Tokens are padded to a multiple of `rows`; above `most` tokens it
    cannot run. Launches are captured inside `around()`. Candidates with the same `make` share
    copies.
    """

    name: str
    nbytes: int
    make: Callable[[], Run]
    x: Tensor
    exact: Callable[[Tensor], Tensor]
    baseline: str
    tune: Callable[[Sequence[Run], Tensor], Tuned] = as_made
    rows: int = 1
    most: int | None = None
    around: Callable[[], AbstractContextManager[None]] = nullcontext


Makers = Mapping[str, Callable[[], list[Candidate]]]


@dataclass(frozen=True)
class Layer:
    """A layer with its inputs, its candidates with their copies, and why others cannot run."""

    name: str
    shape: tuple[int, int]
    ready: Sequence[tuple[Candidate, Sequence[Run]]]
    failed: dict[str, str]


@dataclass(frozen=True)
class Wanted:
    """The result of some tokens in float64."""

    tokens: Tensor
    exact: Tensor

    def error(self, result: Tensor) -> float:
        """The error of these tokens; nan where any token has one."""
        return error(result[self.tokens], self.exact) if result.isfinite().all() else torch.nan


@dataclass(frozen=True)
class Prepared:
    """A candidate's chain for one number of tokens, what tuning said, and the error before."""

    candidate: Candidate
    runs: Sequence[Run]  # what the chain's launches read must not be freed before it
    chain: Chain
    wanted: Wanted
    copies: int
    note: str
    error: float


def random_weights(
    shape: tuple[int, int], device: torch.device, group: int = 4
) -> tuple[Tensor, Tensor]:
    """A dense bf16 weight without zeros, and the same with half of every group at random."""
    generator = torch.Generator(device).manual_seed(0)
    out, width = shape
    dense = torch.randn(out, width, generator=generator, device=device, dtype=torch.bfloat16)
    dense = dense.mul_(width**-0.5).masked_fill_(dense == 0, width**-0.5)
    kept = tuple(combinations(range(group), group // 2))
    keeps = torch.zeros(len(kept), group, dtype=torch.bool, device=device)
    keeps.scatter_(1, torch.tensor(kept, device=device), True)
    choice = torch.randint(
        len(kept), (out, width // group), generator=generator, device=device, dtype=torch.int32
    )
    return dense, dense.masked_fill(~keeps[choice].flatten(1), 0)


def random_inputs(tokens: int, width: int, step: int, device: torch.device) -> Tensor:
    """Normal bf16 numbers for so many tokens, and more up to a whole step."""
    generator = torch.Generator(device).manual_seed(1)
    rows = -(-tokens // step) * step
    return torch.randn(rows, width, generator=generator, device=device, dtype=torch.bfloat16)


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A frozen `nn.Linear` with these very tensors."""
    out, width = weight.shape
    linear = nn.Linear(width, out, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def packed_layer(weight: Tensor, format: str, bias: Tensor | None = None) -> SparseLinear:
    """A `SparseLinear` that runs its reference; `use` gives it another implementation.

    Raises: ValueError for an unknown format, or a weight that it cannot hold.
    """
    return packed_linear("", linear_of(weight, bias), parse_format(format), REFERENCE)


def most_tokens(layer: SparseLinear, implementation: str, tokens: Sequence[int]) -> int:
    """The largest of these numbers of tokens that the implementation takes.

    Raises: ValueError if it takes none, or the format has none of this name.
    """
    known = {entry.name: entry for entry in layer.format.implementations}
    if implementation not in known:
        raise ValueError(f"{layer.format} has no implementation {implementation!r}")
    problems = {n: known[implementation].why_not(layer.packed, n) for n in tokens}
    runnable = [n for n, problem in problems.items() if problem is None]
    if not runnable:
        raise ValueError(next(iter(problems.values())))
    return max(runnable)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: int = 4096) -> Tensor:
    """`x @ weight.T + bias` in float64, some rows of the weight at a time."""
    wide = x.double()
    result = torch.cat([wide @ part.double().t() for part in weight.split(rows)], dim=1)
    return result if bias is None else result + bias.double()


def copies_for(nbytes: int, memory: int) -> int:
    """How many copies of a weight of these bytes to rotate over, within `memory` bytes."""
    return max(1, min(-(-COLD_BYTES // nbytes), MOST_LAUNCHES, memory // nbytes))


def launches_for(nbytes: int, operations: int, copies: int) -> int:
    """How many launches a chain has: about 3 ms of them, in whole rotations.

    A rotation cut short would begin again with copies that the cache still holds.
    """
    wanted = min(MOST_LAUNCHES, CHAIN_BYTES // nbytes, CHAIN_OPERATIONS // operations)
    return copies * max(1, wanted // copies)


def chain(runs: Sequence[Run], x: Tensor, launches: int) -> Chain:
    """The launches on x, rotating over the copies: one CUDA graph, or plain calls on a CPU.

    Raises: RuntimeError on a GPU if they cannot be captured: a row is device time.
    """
    made = timing.chain([partial(run, x) for run in runs], x.device, launches)
    if x.is_cuda and not made.captured:
        raise RuntimeError("cannot be captured in a CUDA graph")
    return made


def wanted_of(candidate: Candidate, x: Tensor) -> Wanted:
    """The exact result for `CHECKED` of the tokens, or for all where there are no more."""
    spread = torch.linspace(0, len(x) - 1, min(len(x), CHECKED), dtype=torch.float64)
    tokens = spread.round().long().to(x.device)
    return Wanted(tokens, candidate.exact(x[tokens]))


def error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact||; nan where the result has one."""
    return float((result.double() - exact).norm() / exact.norm())


def error_of_one(run: Run, x: Tensor, wanted: Wanted) -> float:
    """The error of a single call, into memory that held nan."""
    shape = len(x), wanted.exact.shape[1]
    poison = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
    del poison  # the allocator hands the same memory to the call
    return wanted.error(run(x))


def error_of_last(chain: Chain, wanted: Wanted) -> float:
    """The error of the last launch of one replay, into memory that held nan."""
    _result(chain).fill_(torch.nan)
    chain.replay()
    return wanted.error(_result(chain))


def _result(chain: Chain) -> Tensor:
    result = chain.result()
    assert isinstance(result, Tensor)
    return result


def clocks_asked() -> "subprocess.Popen[str] | None":
    """A process that asks for the clocks while the GPU works; None without nvidia-smi."""
    query = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS.values())}", "--id=0"]
    try:
        return subprocess.Popen(
            [*query, "--format=csv,noheader,nounits"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except OSError:
        return None


def clocks_answered(process: "subprocess.Popen[str] | None") -> dict[str, str]:
    """MHz, degrees and watts; empty where nvidia-smi did not answer soon."""
    answer = ""
    if process is not None:
        try:
            answer, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    values = [value.strip() for value in answer.split(",")]
    if len(values) != len(CLOCKS):
        values = [""] * len(CLOCKS)
    return dict(zip(CLOCKS, values, strict=True))


def layer_from(name: str, shape: tuple[int, int], makers: Makers, memory: int) -> Layer:
    """The layer's candidates with copies of each, in `memory` bytes, and why others have none."""
    ready, failed = list[tuple[Candidate, Sequence[Run]]](), dict[str, str]()
    made: dict[Callable[[], Run], Sequence[Run]] = {}
    for maker_name, maker in makers.items():
        try:
            for candidate in maker():
                if candidate.make not in made:
                    copies = copies_for(candidate.nbytes, memory // len(makers))
                    made[candidate.make] = [candidate.make() for _ in range(copies)]
                ready.append((candidate, made[candidate.make]))
        except FAILURES as problem:
            failed[maker_name] = reason(problem)
    return Layer(name, shape, ready, failed)


def reason(problem: BaseException) -> str:
    """The first sentence of what went wrong."""
    return first_line(problem).partition(". ")[0][:REASON]


def prepared(candidate: Candidate, runs: Sequence[Run], tokens: int) -> Prepared:
    """The candidate's chain for this number of tokens.

    Raises: ValueError if it takes fewer tokens or its result is wrong, or what its library raises.
    """
    if candidate.most is not None and tokens > candidate.most:
        raise ValueError(f"takes at most {candidate.most} tokens")
    rows = -(-tokens // candidate.rows) * candidate.rows
    x = candidate.x[:rows]
    with candidate.around():
        tuned, note = candidate.tune(runs, x)
        wanted = wanted_of(candidate, x)
        alone = error_of_one(tuned[0], x, wanted)
        if not alone <= WRONG:
            raise ValueError(f"wrong result: relative error {alone:.1e}")
        operations = 2 * x.numel() * wanted.exact.shape[1]
        made = chain(tuned, x, launches_for(candidate.nbytes, operations, len(runs)))
    if rows > tokens:
        note = f"{rows} rows; {note}" if note else f"{rows} rows"
    return Prepared(candidate, tuned, made, wanted, len(runs), note, alone)


def case(layer: Layer, tokens: int, device: torch.device, rounds: int) -> Iterator[Row]:
    """A row for each candidate of the layer at this number of tokens."""
    ready, failed = dict[str, Prepared](), dict(layer.failed)
    for candidate, runs in layer.ready:
        try:
            ready[candidate.name] = prepared(candidate, runs, tokens)
        except FAILURES as problem:
            failed[candidate.name] = reason(problem)
    clocks = clocks_asked() if device.type == "cuda" else None
    timings: Mapping[str, Timing] | None = None
    while timings is None:
        try:
            chains = {name: one.chain for name, one in ready.items()}
            timings = in_turns(chains, device, rounds)
        except VariantFailed as failure:
            del ready[failure.variant]
            failed[failure.variant] = reason(failure.problem)
    shared: dict[str, str | int | float] = {
        "layer": layer.name,
        "out": layer.shape[0],
        "in": layer.shape[1],
        "tokens": tokens,
        **clocks_answered(clocks),
    }
    for one in ready.values():
        yield {**shared, **_measured(one, timings)}
    for name, why in failed.items():
        yield {**shared, **dict.fromkeys(MEASURED, ""), "candidate": name, "note": why}


MEASURED = (
    *("candidate", "dtype", "us", "low_us", "high_us", "rounds", "launches", "copies"),
    *("weight_bytes", "tb_s", "baseline", "vs_cublas", "error", "note"),
)


def _measured(one: Prepared, timings: Mapping[str, Timing]) -> Row:
    candidate, timing = one.candidate, timings[one.candidate.name]
    last = error_of_last(one.chain, one.wanted)
    worst = one.error if last <= one.error else last  # a nan is the worst
    if not worst <= WRONG:
        note = f"wrong result in a chain of launches: relative error {worst:.1e}"
        return {**dict.fromkeys(MEASURED, ""), "candidate": candidate.name, "note": note}
    baseline = timings.get(candidate.baseline)
    values = (
        candidate.name,
        str(candidate.x.dtype).removeprefix("torch."),
        f"{timing.median_us:.3f}",
        f"{timing.low_us:.3f}",
        f"{timing.high_us:.3f}",
        timing.rounds,
        one.chain.launches,
        one.copies,
        candidate.nbytes,
        f"{candidate.nbytes / timing.median_us / 1e6:.3f}",
        candidate.baseline,
        "" if baseline is None else f"{baseline.median_us / timing.median_us:.3f}",
        f"{worst:.2e}",
        one.note,
    )
    return dict(zip(MEASURED, values, strict=True))


def parser_of(
    bench: str, description: str | None, shapes: Sequence[str], tokens: Sequence[int]
) -> argparse.ArgumentParser:
    """The options that these benches share, with the bench's own shapes and tokens."""
    parser = command.parser_of(bench, description)
    parser.add_argument("--shapes", nargs="+", default=shapes, help="models or layers")
    parser.add_argument("--tokens", nargs="+", type=int, default=tokens)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--memory", type=float, default=40.0, help="GB for all copies of a layer")
    parser.add_argument("--time-budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    return parser


def parsed(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the layers that they name."""
    arguments = parser.parse_args(words)
    try:
        arguments.layers = [name for shape in arguments.shapes for name in layers_of(shape)]
    except ValueError as problem:
        parser.error(str(problem))
    return arguments


def measure(
    bench: str,
    arguments: argparse.Namespace,
    layer_of: Callable[[str, argparse.Namespace], Layer],
) -> int:
    """Measures, writes each case's rows as they come; 1 if the time budget left cases out."""
    device = torch.device(arguments.device)
    began, path, left = monotonic(), None, list[str]()
    with torch.no_grad():
        for name in arguments.layers:
            layer = None
            for tokens in arguments.tokens:
                if monotonic() - began > arguments.time_budget:
                    left.append(f"{name}, {tokens} tokens")
                    continue
                layer = layer or layer_of(name, arguments)
                rows = list(case(layer, tokens, device, arguments.rounds))
                path = append(arguments.output, bench, rows, arguments.device)
                print(_summary(rows, monotonic() - began), flush=True)
    if left:
        print(f"out of time, left out: {'; '.join(left)}")
    print(path)
    return int(bool(left))


def _summary(rows: Sequence[Row], seconds: float) -> str:
    """One line for a case: each candidate's microseconds and ratio."""
    said = [f"{row['candidate']} {row['us']} ({row['vs_cublas'] or '-'})" for row in rows]
    said = [
        text if row["us"] else f"{row['candidate']}: {row['note']}"
        for text, row in zip(said, rows, strict=True)
    ]
    first = rows[0]
    return f"{seconds:.0f} s, {first['layer']}, {first['tokens']} tokens: {'; '.join(said)}"
