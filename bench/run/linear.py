"""Every (format, implementation) against eager and prepacked dense, one layer at a time.

    python -m bench.run.linear --threads 2

A row is one candidate at one shape, sparsity and number of tokens; losing rows stay. Weights are
random numbers with random zeros, on all sides the same; the two denses are measured beside each
sparse candidate, in turns, so that a ratio is taken within one comparison. Beside a format that
rounds inputs to int8 in a float32 layer torch's own dense int8 is measured, too.
"""

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bench.lib.command import parser_of
from bench.lib.rows import Row, append
from bench.lib.shapes import ON_CPU, SHAPES, TOKENS_ON_CPU
from bench.lib.timing import timed
from secateur.accelerate.candidates import (
    DENSE,
    PREPACKED,
    Candidate,
    Run,
    admitted,
    dense_candidates,
    runs,
    sparse_candidates,
)
from secateur.core.progress import progress
from secateur.formats import Format, parse_format
from secateur.formats.block import Blocks
from secateur.formats.kernels.timing import Timing, copies_for
from secateur.formats.pack import packed_linear
from secateur.formats.quantised import Quantised
from secateur.patterns.grids import Int8

IN_INT8 = "dense int8"
DENSE_INT8 = Quantised(Int8(), rounds_inputs=True)
ENGINES = ("x86", "onednn")  # of torch's int8: which is faster depends on the number of tokens
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
FORMATS = (
    "block:64x64",
    "csr",
    "semi24",
    "semi24_int8",
    "semi24_int4",
    "semi24_int8_dynamic",
    "bitmap",
)


def sparse_weight(shape: tuple[int, int], format: Format, sparsity: float) -> Tensor:
    """Random numbers with random zeros that the format stores well, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    out, width = shape
    weight = torch.randn(out, width, generator=generator)
    if format.name.startswith("semi24"):
        rank = torch.rand(out, width // 4, 4, generator=generator).argsort(-1)
        return weight * (rank < 2).flatten(1)
    rows, cols = (format.rows, format.cols) if isinstance(format, Blocks) else (1, 1)
    keep = torch.rand(out // rows, 1, width // cols, 1, generator=generator) >= sparsity
    return weight * keep.expand(-1, rows, -1, cols).reshape(out, width)


def candidates(linear: nn.Linear, format: Format, tokens: int) -> list[Candidate]:
    """All denses and every implementation; the reference only where a format has nothing else."""
    sparse, _ = sparse_candidates(linear, format, tokens)
    if not sparse:
        layer = packed_linear("", linear, format)
        layer.use((("reference", None),))
        held, quantised = layer.held_bytes, None if format.is_exact else layer.packed
        sparse = [Candidate(f"{format} reference", lambda: layer, held, tuple(held), quantised)]
    rounds = isinstance(format, Quantised) and format.grid == Int8() and format.rounds_inputs
    in_int8 = dense_in_int8(linear) if rounds and linear.weight.dtype == torch.float32 else []
    return [*dense_candidates(linear, tokens), *in_int8, *sparse]


def dense_in_int8(linear: nn.Linear) -> list[Candidate]:
    """Dense layers on codes as torch has them: a scale an output, and one for all tokens of a call.

    They have no place in the library, whose formats give each token its own scale: torch has
    deprecated the tensors that they take, and says so in a warning.
    """
    packed = DENSE_INT8.pack(linear.weight)

    def make(engine: str) -> Run:
        scales = packed["scales"][:, 0].double()
        zeros = torch.zeros_like(scales, dtype=torch.long)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                codes = torch._make_per_channel_quantized_tensor(packed["values"], scales, zeros, 0)
            arranged = torch.ops.quantized.linear_prepack(codes, None)
        finally:
            torch.backends.quantized.engine = before
        run: Run = partial(torch.ops.quantized.linear_dynamic, W_prepack=arranged)
        return run

    holds = {"values": packed["values"].nbytes}
    return [
        Candidate(f"{IN_INT8} {engine}", partial(make, engine), holds, ("values",), packed)
        for engine in ENGINES
        if engine in torch.backends.quantized.supported_engines
    ]


def case(
    name: str, format: Format, sparsity: float, tokens: int, dtype: torch.dtype
) -> Iterator[Row]:
    """A row for each candidate."""
    shape = SHAPES[name]
    weight = sparse_weight(shape, format, sparsity).to(dtype)
    linear = nn.Linear(shape[1], shape[0], bias=False, device="meta").requires_grad_(False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    kept, wrong = admitted(candidates(linear, format, tokens), linear, x)
    if wrong:
        raise RuntimeError("; ".join(wrong))
    copied = runs(kept, copies_for(sum(candidate.nbytes for candidate in kept)))
    calls = {key: [partial(run, x) for run in copies] for key, copies in copied.items()}
    measured = timed(calls, weight.device)
    best_int8 = min(
        (key for key in calls if key.startswith(IN_INT8)),
        key=lambda key: measured.timings[key].median_us,
        default=IN_INT8,
    )
    nbytes = {candidate.name: candidate.nbytes for candidate in kept}
    for key, timing in measured.timings.items():
        yield {
            "layer": name,
            "out": shape[0],
            "in": shape[1],
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": tokens,
            "format": str(format),
            "sparsity": sparsity,
            "candidate": key,
            "us": f"{timing.median_us:.1f}",
            "low_us": f"{timing.low_us:.1f}",
            "high_us": f"{timing.high_us:.1f}",
            "rounds": timing.rounds,
            "weight_bytes": nbytes[key],
            "vs_eager": _ratio(measured.timings, DENSE, key),
            "vs_prepacked": _ratio(measured.timings, PREPACKED, key),
            "vs_int8": _ratio(measured.timings, best_int8, key),
            "others": f"{measured.others:.3f}",
        }


def _sparsities(format: Format, asked: Sequence[float]) -> Sequence[float]:
    """Half for 2:4, which stores no other, and for what runs its reference: it unpacks anyway."""
    fixed = format.name.startswith("semi24") or format.name == "bitmap"
    return (0.5,) if fixed else asked


def _ratio(timings: Mapping[str, Timing], baseline: str, key: str) -> str:
    if baseline not in timings:
        return ""
    return f"{timings[baseline].median_us / timings[key].median_us:.3f}"


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All rows of the chosen cases, in order."""
    cases = [
        (name, format, sparsity, tokens)
        for name in arguments.layers
        for format in map(parse_format, arguments.formats)
        for sparsity in _sparsities(format, arguments.sparsities)
        for tokens in arguments.tokens
    ]
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]
    with torch.no_grad():
        return [row for each in progress(cases, "layers") for row in case(*each, dtype)]


def main(words: Sequence[str] | None = None) -> None:
    """Measures, appends the rows to a file in bench/results, and prints its path."""
    parser = parser_of("linear", __doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--layers", nargs="+", choices=SHAPES, default=ON_CPU)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS_ON_CPU)
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    print(append(arguments.output, "linear", measure(arguments), arguments.device))


if __name__ == "__main__":
    main()
