"""Many tokens on a GPU: 2:4 layers and rounded inputs beside dense cuBLAS and cuSPARSELt.

    python -m bench.run.prefill --shapes llama-3-8b sam-vit-h

A row is one candidate at one layer and number of tokens; losing rows stay, and one that cannot run
or is wrong has its reason in `note`. Every candidate adds a bias. Weights are random and cold
(`bench.lib.cold`). A ratio is the time of dense cuBLAS bf16, on dense random weights, over that of
the candidate in the same run. Rows are written after each number of tokens.

`accelerate_` is the 2:4 layer as that function left it, told all of these numbers of tokens, on
measurements of its own made in this run; its note says what runs. Formats that end in `_dynamic`
round their inputs within what is timed. `--candidates` leaves out what a host is too slow for: on
some, a call of cuSPARSELt takes 0.2 s before anything is launched.

Errors are those of up to 128 tokens, spread over all, against float64 of the weight that is stored.
For `_dynamic` that is the format's definition: the inputs are rounded first, as it says, so that
what rounding them costs is no error here.
"""

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bench.lib import cold
from bench.lib.peer_kernels import CUBLAS, CUSPARSELT, cublas, cusparselt
from bench.lib.shapes import SHAPES, TOKENS_OF_PREFILL
from secateur.accelerate.layer_report import LayerReport
from secateur.accelerate.verb import accelerate_
from secateur.formats import SparseLinear
from secateur.formats.dynamic import quantised
from secateur.formats.format import dequantised
from secateur.formats.kernels.cusparselt import STEPS
from secateur.formats.linear import REFERENCE
from secateur.formats.op import table

ACCELERATE = "accelerate_"
FORMATS = {
    "semi24": ("prefill", "dense", "cusparselt", "decode"),
    "semi24_int4": ("prefill", "decode"),
    "semi24_int8": ("prefill",),
    "semi24_fp8": ("prefill",),
    "int8_dynamic": ("torch",),
    "fp8_dynamic": ("torch",),
    "semi24_int8_dynamic": ("prefill", "cusparselt"),
    "semi24_fp8_dynamic": ("prefill",),
}
CODES = {
    "int8_dynamic": torch.int8,
    "fp8_dynamic": torch.float8_e4m3fn,
    "semi24_int8_dynamic": torch.int8,
    "semi24_fp8_dynamic": torch.float8_e4m3fn,
}
STEP = max(STEPS.values())


@dataclass(frozen=True)
class Data:
    """The weights, dense and 2:4, the bias, and the inputs at the most of these tokens."""

    dense: Tensor
    sparse: Tensor
    bias: Tensor
    x: Tensor
    tokens: Sequence[int]


def implemented(data: Data, format: str, implementation: str) -> list[cold.Candidate]:
    """The format run by this implementation.

    Raises: ValueError where it can run at none of the numbers of tokens.
    """
    weight = data.sparse if format.startswith("semi24") else data.dense
    layer, codes = cold.packed_layer(weight, format, data.bias), CODES.get(format)
    most = cold.most_tokens(layer, implementation, data.tokens)
    layer.use(((implementation, most), *REFERENCE))
    packed = layer.packed

    def make() -> cold.Run:
        return deepcopy(layer)

    def exact(x: Tensor) -> Tensor:
        if codes is None:
            return cold.product(x, dequantised(packed), data.bias)
        tokens, scales = quantised(x, codes)
        return cold.product(tokens.double() * scales, dequantised(packed), data.bias)

    name, nbytes = f"{format} {implementation}", bytes_read(layer)
    return [cold.Candidate(name, nbytes, make, data.x, exact, CUBLAS, most=most)]


def accelerated(data: Data) -> list[cold.Candidate]:
    """The 2:4 layer after `accelerate_`: packed, or still dense."""
    model = nn.Sequential(cold.linear_of(data.sparse, data.bias))
    report = accelerate_(model, data.tokens, ["semi24"], remeasure=True)
    layer, entry = model[0], report.layers[0]
    assert isinstance(layer, nn.Linear)

    def make() -> cold.Run:
        return deepcopy(layer)

    def tune(runs: Sequence[cold.Run], x: Tensor) -> cold.Tuned:
        return runs, runs_at(entry, len(x))

    exact = partial(cold.product, weight=data.sparse, bias=data.bias)
    return [cold.Candidate(ACCELERATE, bytes_read(layer), make, data.x, exact, CUBLAS, tune)]


def runs_at(entry: LayerReport, tokens: int) -> str:
    """`runs cusparselt`, or `runs dense: ` and why."""
    if not entry.table:
        return f"runs dense: {entry.reason}"[: cold.REASON]
    rows = (name for name, limit in entry.table if limit is None or tokens <= limit)
    return f"runs {next(rows)}"


def bytes_read(layer: nn.Linear) -> int:
    """The fewest bytes of weights that a launch reads, of the implementations the layer runs.

    So there are copies enough for each of them.
    """
    if not isinstance(layer, SparseLinear):
        return layer.weight.nbytes
    format, held = layer.format, layer.held_bytes
    rows = table(layer.dispatch, format.implementations)
    read = [entry.reads(format) for _, entry in rows if entry.name != "reference"]
    return min((sum(map(held.__getitem__, names)) for names in read), default=layer.nbytes)


def layer_of(name: str, arguments: argparse.Namespace) -> cold.Layer:
    """The layer in every format, with copies of each; on a CPU by the references, too."""
    device, shape = torch.device(arguments.device), SHAPES[name]
    dense, sparse = cold.random_weights(shape, device)
    generator = torch.Generator(device).manual_seed(2)
    bias = torch.randn(shape[0], generator=generator, device=device, dtype=torch.bfloat16)
    x = cold.random_inputs(max(arguments.tokens), shape[1], STEP, device)
    data = Data(dense, sparse, bias, x, arguments.tokens)
    makers: dict[str, Callable[[], list[cold.Candidate]]] = {
        CUBLAS: lambda: [cublas(dense, x, CUBLAS, bias)],
        CUSPARSELT: lambda: cusparselt(sparse, x, bias),
    }
    for format, names in FORMATS.items():
        for implementation in (*names, *(["reference"] if device.type == "cpu" else [])):
            makers[f"{format} {implementation}"] = partial(
                implemented, data, format, implementation
            )
        if format == "semi24":
            makers[ACCELERATE] = partial(accelerated, data)
    wanted = {CUBLAS, *(arguments.candidates or makers)}
    if unknown := wanted - set(makers):
        raise ValueError(f"candidates are {', '.join(makers)}, got {', '.join(sorted(unknown))}")
    makers = {name: maker for name, maker in makers.items() if name in wanted}
    return cold.layer_from(name, shape, makers, int(1e9 * arguments.memory))


def main(words: Sequence[str] | None = None) -> int:
    """Measures, writes each case's rows as they come; 1 if the time budget left cases out."""
    parser = cold.parser_of("prefill", __doc__, ["llama-3-8b", "sam-vit-h"], TOKENS_OF_PREFILL)
    parser.add_argument("--candidates", nargs="+", metavar="NAME", help="beside dense cuBLAS")
    return cold.measure("prefill", cold.parsed(parser, words), layer_of)


if __name__ == "__main__":
    raise SystemExit(main())
