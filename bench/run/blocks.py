"""Zeros in blocks, and anywhere, on a GPU: any number of tokens, or a whole training step.

    python -m bench.run.blocks
    python -m bench.run.blocks --train --tokens 8192 --sparsities 0.8
    python -m bench.run.blocks --formats bitmap bitmap_int4 --sparsities 0.5 0.8 --tokens 1 8 16

A row is one candidate at one layer, format, sparsity and number of tokens; losing rows stay,
and one that cannot run or is wrong has its reason in `note`. The zeros of a layer, whole blocks or
single weights, are chosen at random, in all of the weight alike. Weights are random and cold
(`bench.lib.cold`); a bias is added. Results are held to the product with the weight that is stored,
rounded to a grid in `bitmap_int4`. A ratio is the time of dense cuBLAS bf16, on dense random
weights, over that of the candidate in the same run. Rows are written after each number of tokens.

The peer is torch's own layout, `torch.sparse_bsr` for blocks and `torch.sparse_csr` for zeros
anywhere, by `torch.nn.functional.linear`; of 16-bit numbers, where ours are rounded. With
`--train` a run is forward and backward, of input, weight and bias, where the gradient of the
result is the result; the error is that of the input's gradient. torch's layout has none.
"""

import argparse
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from bench.lib import cold
from bench.lib.peer_kernels import CUBLAS, cublas
from bench.lib.shapes import SHAPES
from secateur.formats import SparseLinear, parse_format, to_torch_sparse
from secateur.formats.block import Blocks
from secateur.formats.linear import REFERENCE
from secateur.formats.op import table

LAYERS = ("Llama-3-8B gate_up", "Llama-3-8B down")
FORMATS = ("block:64x64", "block:32x32")
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
TOKENS = (1, 4, 16, 4096)
IMPLEMENTATIONS = ("decode", "prefill", "expand")
PEERS = {"block": "bsr", "bitmap": "csr", "bitmap_int4": "csr"}  # torch's own layout
MOST_BY_CSR = 1  # token: a hundredth of dense at 8, and minutes for a row of 4096
STEP = " forward + backward"


def named(layer: str, format: str, sparsity: float) -> str:
    """`Llama-3-8B down block:64x64@0.8`."""
    return f"{layer} {format}@{sparsity:g}"


def with_zeros(weight: Tensor, format: str, sparsity: float) -> Tensor:
    """The weight with this share of its blocks, or of its weights, zero, exactly, at random."""
    chosen = parse_format(format)
    rows, cols = (chosen.rows, chosen.cols) if isinstance(chosen, Blocks) else (1, 1)
    down, across = weight.shape[0] // rows, weight.shape[1] // cols
    generator = torch.Generator(weight.device).manual_seed(3)
    order = torch.randperm(down * across, generator=generator, device=weight.device)
    keep = torch.ones(down * across, dtype=torch.bool, device=weight.device)
    keep[order[: round(sparsity * down * across)]] = False
    spread = keep.view(down, across).repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    return weight.masked_fill(~spread, 0)


def implemented(
    layer: SparseLinear, x: Tensor, exact: cold.Run, name: str, tokens: Sequence[int]
) -> list[cold.Candidate]:
    """The layer run by this implementation; on a CPU, for tests, by what runs there.

    Raises: ValueError where it can run at none of the numbers of tokens.
    """
    most = cold.most_tokens(layer, name, tokens)
    run = deepcopy(layer)
    run.use(((name, most), *REFERENCE))
    name, nbytes = f"{layer.format.name} {name}", sum(run.held_bytes.values())
    return [cold.Candidate(name, nbytes, lambda: deepcopy(run), x, exact, CUBLAS, most=most)]


def peer(layer: SparseLinear, x: Tensor, exact: cold.Run) -> list[cold.Candidate]:
    """The product with a weight in torch's own layout."""
    bias, layout = layer.bias, PEERS[layer.format.name]

    def make() -> cold.Run:
        weight = to_torch_sparse(deepcopy(layer).packed, f"sparse_{layout}")
        return lambda x: torch.nn.functional.linear(x, weight, bias)

    most, name = MOST_BY_CSR if layout == "csr" else None, f"torch {layout}"
    return [cold.Candidate(name, layer.packed.nbytes, make, x, exact, CUBLAS, most=most)]


def step_of(layer: nn.Linear) -> cold.Run:
    """Forward and backward of |y|^2 / 2, all gradients made; the result is that of the input."""
    parameters = list(layer.parameters())

    def run(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            result = layer(leaf)
            return torch.autograd.grad(result, [leaf, *parameters], result.detach())[0]

    return run


def steps(
    dense: Tensor, layer: SparseLinear, bias: Tensor, x: Tensor
) -> dict[str, Callable[[], list[cold.Candidate]]]:
    """A training step of the dense layer and of the packed one."""

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return cold.product(x, weight, bias) @ weight.double()

    def dense_step() -> cold.Run:
        return step_of(cold.linear_of(dense.clone(), bias.clone()).requires_grad_())

    def sparse_step() -> cold.Run:
        return step_of(deepcopy(layer).unfreeze_().requires_grad_())

    def candidate(
        name: str, nbytes: int, make: Callable[[], cold.Run], weight: Tensor
    ) -> list[cold.Candidate]:
        wanted = partial(exact, weight=weight)
        return [cold.Candidate(name + STEP, nbytes, make, x, wanted, CUBLAS + STEP)]

    runs = deepcopy(layer).unfreeze_()
    names = dict.fromkeys(e.name for _, e in table(runs.dispatch, runs.format.implementations))
    sparse = f"{layer.format.name} {list(names)[-1]}"  # what runs the most tokens
    return {
        CUBLAS + STEP: lambda: candidate(CUBLAS, dense.nbytes, dense_step, dense),
        sparse + STEP: lambda: candidate(sparse, runs.nbytes, sparse_step, layer.packed.dense()),
    }


def layer_of(name: str, arguments: argparse.Namespace) -> cold.Layer:
    """The layer with these zeros, and dense, with copies of each."""
    shape_name, _, zeros = name.rpartition(" ")
    format, _, sparsity = zeros.partition("@")
    device, shape = torch.device(arguments.device), SHAPES[shape_name]
    dense, _ = cold.random_weights(shape, device)
    bias = torch.randn(shape[0], device=device, dtype=torch.bfloat16)
    x = cold.random_inputs(max(arguments.tokens), shape[1], 1, device)
    layer = cold.packed_layer(with_zeros(dense, format, float(sparsity)), format, bias)
    exact = partial(cold.product, weight=layer.packed.dense(), bias=bias)
    if arguments.train:
        return cold.layer_from(name, shape, steps(dense, layer, bias, x), _room(arguments))
    known = [entry.name for entry in layer.format.implementations]
    names = [n for n in IMPLEMENTATIONS if n in known] if device.type == "cuda" else ["reference"]
    makers: dict[str, Callable[[], list[cold.Candidate]]] = {
        CUBLAS: lambda: [cublas(dense, x, CUBLAS, bias)],
        f"torch {PEERS[layer.format.name]}": partial(peer, layer, x, exact),
    }
    for one in names:
        makers[f"{layer.format.name} {one}"] = partial(
            implemented, layer, x, exact, one, arguments.tokens
        )
    return cold.layer_from(name, shape, makers, _room(arguments))


def _room(arguments: argparse.Namespace) -> int:
    return int(1e9 * arguments.memory)


def main(words: Sequence[str] | None = None) -> int:
    """Measures, writes each case's rows as they come; 1 if the time budget left cases out."""
    parser = cold.parser_of("blocks", __doc__, LAYERS, TOKENS)
    parser.add_argument(
        "--formats", nargs="+", default=FORMATS, help="block:ROWSxCOLUMNS, bitmap, bitmap_int4"
    )
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--train", action="store_true", help="forward and backward")
    arguments = cold.parsed(parser, words)
    if unknown := [f for f in arguments.formats if parse_format(f).name not in PEERS]:
        parser.error(f"formats are blocks, bitmap and bitmap_int4, got {', '.join(unknown)}")
    arguments.layers = [
        named(layer, format, sparsity)
        for layer in arguments.layers
        for format in arguments.formats
        for sparsity in arguments.sparsities
    ]
    return cold.measure("blocks", arguments, layer_of)


if __name__ == "__main__":
    raise SystemExit(main())
