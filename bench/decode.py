"""Few tokens on a GPU: the decode kernels beside dense cuBLAS and the sparse and int4 peers.

    python -m bench.decode --shapes llama-3-8b --peers FOLDER/libsparse_marlin.so

A row is one candidate at one layer and number of tokens; losing rows stay, and one that cannot run
or is wrong has its reason in `note`. Weights are random and cold (`bench.cold`), packed for real,
and every result is compared with the float64 product of the exactly dequantised weight. A ratio is
the time of dense cuBLAS, on dense random weights, over that of the candidate in the same run.
Rows are written after each number of tokens. `--plain` adds our kernels without programmatic
dependent launch.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor, nn

from bench.cold import (
    ROUNDS,
    Candidate,
    Chain,
    Run,
    chain,
    copies_for,
    error_of_last,
    error_of_one,
    in_turns,
    launches_for,
    product,
)
from bench.peers import CUBLAS, CUSPARSELT_ROWS, WRONG, peers
from bench.rows import Row, append
from bench.shapes import SHAPES, TOKENS_OF_DECODE, layers_of
from secateur.formats import SparseLinear, parse_format
from secateur.formats.candidates import first_line
from secateur.formats.contract import packed_bytes
from secateur.formats.decode24.arrange import FORMATS as KINDS
from secateur.formats.decode24.choose import choose
from secateur.formats.decode24.config import MOST_TOKENS, Case
from secateur.formats.decode24.tune import compile_all
from secateur.formats.format import dequantised
from secateur.formats.pack import packed_linear
from secateur.kernels.timing import Timing

RESULTS = Path(__file__).parent / "results"
FORMATS = ("semi24", "semi24_int4", "semi24_int8", "semi24_fp8")
IMPLEMENTATION = "decode"
REFERENCE = ("reference", None)
DEPENDENT = "SECATEUR_DEPENDENT"  # set to 0: kernels prepared now are launched plainly
LAUNCHES = "secateur.formats.decode24.multiply"
REASON = 160  # characters of a reason that a row carries
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, OSError, MemoryError)
PATIENCE = 0.5  # seconds that an answer about the clocks may take beyond the measurement
CLOCKS = {"sm_mhz": "clocks.sm", "celsius": "temperature.gpu", "watts": "power.draw"}
KEPT = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))  # of each four inputs

Launching = Callable[[], AbstractContextManager[None]]


@contextmanager
def plainly() -> Iterator[None]:
    """Kernels captured inside are launched without programmatic dependence."""
    before = os.environ.get(DEPENDENT)
    os.environ[DEPENDENT] = "0"
    _forget_launches()
    try:
        yield
    finally:
        del os.environ[DEPENDENT]
        if before is not None:
            os.environ[DEPENDENT] = before
        _forget_launches()


def _forget_launches() -> None:
    """Prepared launches keep the choice they were made with; none are there before the first."""
    if LAUNCHES in sys.modules:
        sys.modules[LAUNCHES]._launch.cache_clear()


@dataclass(frozen=True)
class Layer:
    """A layer with its inputs, its candidates with their copies, and why others cannot run."""

    name: str
    shape: tuple[int, int]
    ready: Sequence[tuple[Candidate, Sequence[Run]]]
    failed: dict[str, str]


@dataclass(frozen=True)
class Prepared:
    """A candidate's chain for one number of tokens, what tuning said, and the error before."""

    candidate: Candidate
    chain: Chain
    exact: Tensor
    copies: int
    note: str
    error: float


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


def random_weights(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """A dense bf16 weight without zeros, and the same with two of every four at random."""
    generator = torch.Generator(device).manual_seed(0)
    out, width = shape
    dense = torch.randn(out, width, generator=generator, device=device, dtype=torch.bfloat16)
    dense = dense.mul_(width**-0.5).masked_fill_(dense == 0, width**-0.5)
    keeps = torch.zeros(len(KEPT), 4, dtype=torch.bool, device=device)
    keeps.scatter_(1, torch.tensor(KEPT, device=device), True)
    choice = torch.randint(
        len(KEPT), (out, width // 4), generator=generator, device=device, dtype=torch.int32
    )
    return dense, dense.masked_fill(~keeps[choice].flatten(1), 0)


def ours(
    weight: Tensor, x: Tensor, format: str, tokens: Sequence[int], modes: Mapping[str, Launching]
) -> list[Candidate]:
    """A `SparseLinear` that runs the decode kernel, in each mode on the same copies.

    On a CPU, where there is no decode kernel, it runs the reference.

    Raises: ValueError where the format or its decode kernel cannot run here.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    layer = packed_linear("", linear, parse_format(format))
    most = _most_tokens(layer, tokens)
    runs = "" if most else " reference"
    layer.use(((IMPLEMENTATION, most), REFERENCE) if most else (REFERENCE,))
    exact, nbytes = product(x, dequantised(layer.packed)), packed_bytes(layer.packed)
    candidate = Candidate(format, nbytes, lambda: deepcopy(layer), x, exact, CUBLAS, most=most)
    return [
        replace(candidate, name=f"{format}{runs}{mode}", around=around)
        for mode, around in modes.items()
    ]


def _most_tokens(layer: SparseLinear, tokens: Sequence[int]) -> int | None:
    """The largest of these numbers of tokens that the decode kernel takes; None is the reference.

    Raises: ValueError if it takes none on a GPU, where the reference would time its unpacking.
    """
    known = {entry.name: entry for entry in layer.format.folder.IMPLEMENTATIONS}
    problem: str | None = f"{layer.format} has no implementation {IMPLEMENTATION!r}"
    if IMPLEMENTATION in known:
        problems = {n: known[IMPLEMENTATION].why_not(layer.packed, n) for n in tokens}
        runnable = [n for n, problem in problems.items() if problem is None]
        if runnable:
            return max(runnable)
        problem = next(iter(problems.values()))
    if layer.packed.values.is_cuda:
        raise ValueError(problem)
    return None


def layer_of(name: str, arguments: argparse.Namespace) -> Layer:
    """The layer's weights packed by everyone, with copies of each."""
    device, shape = torch.device(arguments.device), SHAPES[name]
    dense, sparse = random_weights(shape, device)
    rows = -(-max(arguments.tokens) // CUSPARSELT_ROWS) * CUSPARSELT_ROWS
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(rows, shape[1], generator=generator, device=device, dtype=torch.bfloat16)
    makers = dict(peers(dense, sparse, x, arguments.peers))
    modes: dict[str, Launching] = {"": nullcontext}
    if arguments.plain:
        modes[" plain"] = plainly
    for format in arguments.formats:
        makers[format] = partial(ours, sparse, x, format, arguments.tokens, modes)
    memory = int(1e9 * arguments.memory) // len(makers)
    ready, failed = list[tuple[Candidate, Sequence[Run]]](), dict[str, str]()
    made: dict[Callable[[], Run], Sequence[Run]] = {}
    for maker_name, maker in makers.items():
        try:
            for candidate in maker():
                if candidate.make not in made:
                    copies = copies_for(candidate.nbytes, memory)
                    made[candidate.make] = [candidate.make() for _ in range(copies)]
                ready.append((candidate, made[candidate.make]))
        except FAILURES as problem:
            failed[maker_name] = _reason(problem)
    return Layer(name, shape, ready, failed)


def compile_ours(arguments: argparse.Namespace, device: torch.device) -> None:
    """Nothing; compiles all kernels that will be measured, in parallel, before any is needed."""
    cases = {
        Case(*KINDS[format], torch.bfloat16, *SHAPES[name], tokens).widest
        for name in arguments.layers
        for format in arguments.formats
        for tokens in arguments.tokens
        if format in KINDS and tokens <= MOST_TOKENS
    }
    compile_all([(case, choose(case, device)) for case in cases], device, None)


def _reason(problem: BaseException) -> str:
    """The first sentence of what went wrong."""
    return first_line(problem).partition(". ")[0][:REASON]


def prepared(candidate: Candidate, runs: Sequence[Run], tokens: int) -> Prepared:
    """The candidate's chain for this number of tokens.

    Raises: ValueError if it takes fewer tokens or its result is wrong, or what its library raises.
    """
    if candidate.most is not None and tokens > candidate.most:
        raise ValueError(f"takes at most {candidate.most} tokens")
    rows = -(-tokens // candidate.rows) * candidate.rows
    x, exact = candidate.x[:rows], candidate.exact[:rows]
    with candidate.around():
        tuned, note = candidate.tune(runs, x, exact)
        alone = error_of_one(tuned[0], x, exact)
        if not alone <= WRONG:
            raise ValueError(f"wrong result: relative error {alone:.1e}")
        launches = launches_for(candidate.nbytes, len(runs))
        made = chain(tuned, x, launches)
    if rows > tokens:
        note = f"{rows} rows; {note}" if note else f"{rows} rows"
    return Prepared(candidate, made, exact, len(runs), note, alone)


def case(layer: Layer, tokens: int, device: torch.device, rounds: int) -> Iterator[Row]:
    """A row for each candidate of the layer at this number of tokens."""
    ready, failed = dict[str, Prepared](), dict(layer.failed)
    for candidate, runs in layer.ready:
        try:
            ready[candidate.name] = prepared(candidate, runs, tokens)
        except FAILURES as problem:
            failed[candidate.name] = _reason(problem)
    clocks = clocks_asked() if device.type == "cuda" else None
    timings = in_turns({name: one.chain for name, one in ready.items()}, device, rounds)
    shared: dict[str, str | int | float] = {
        "layer": layer.name,
        "out": layer.shape[0],
        "in": layer.shape[1],
        "tokens": tokens,
        **clocks_answered(clocks),
    }
    for one in ready.values():
        yield {**shared, **_measured(one, timings)}
    for name, reason in failed.items():
        yield {**shared, **dict.fromkeys(MEASURED, ""), "candidate": name, "note": reason}


MEASURED = (
    *("candidate", "dtype", "us", "low_us", "high_us", "rounds", "launches", "copies"),
    *("weight_bytes", "tb_s", "baseline", "vs_cublas", "error", "note"),
)


def _measured(one: Prepared, timings: Mapping[str, Timing]) -> Row:
    candidate, timing = one.candidate, timings[one.candidate.name]
    last = error_of_last(one.chain, one.exact)
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


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the layers that they name."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", default=["llama-3-8b"], help="models or layers")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS_OF_DECODE)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--plain", action="store_true", help="also without dependent launch")
    parser.add_argument("--peers", type=Path, help="libsparse_marlin.so, its packer beside it")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--memory", type=float, default=40.0, help="GB for all copies of a layer")
    parser.add_argument("--time-budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    try:
        arguments.layers = [name for shape in arguments.shapes for name in layers_of(shape)]
    except ValueError as problem:
        parser.error(str(problem))
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Measures, writes each case's rows as they come; 1 if the time budget left cases out."""
    arguments = parsed(words)
    device = torch.device(arguments.device)
    began, path, left = monotonic(), None, list[str]()
    if device.type == "cuda":
        compile_ours(arguments, device)
    with torch.no_grad():
        for name in arguments.layers:
            layer = None
            for tokens in arguments.tokens:
                if monotonic() - began > arguments.time_budget:
                    left.append(f"{name}, {tokens} tokens")
                    continue
                layer = layer or layer_of(name, arguments)
                rows = list(case(layer, tokens, device, arguments.rounds))
                path = append(arguments.output, "decode", rows, arguments.device)
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


if __name__ == "__main__":
    raise SystemExit(main())
