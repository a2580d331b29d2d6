"""Few tokens on a GPU: the decode kernels beside dense cuBLAS and the sparse and int4 peers.

    python -m bench.run.decode --shapes llama-3-8b --peers FOLDER/libsparse_marlin.so

A row is one candidate at one layer and number of tokens; losing rows stay, and one that cannot run
or is wrong has its reason in `note`. Weights are random and cold (`bench.lib.cold`), packed for
real, and every result is compared with the float64 product of the exactly dequantised weight. A
ratio is the time of dense cuBLAS, on dense random weights, over that of the candidate in the same
run. Rows are written after each number of tokens. `--plain` adds our kernels without programmatic
dependent launch.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.lib import cold
from bench.lib.peer_kernels import CUBLAS, CUSPARSELT_ROWS, peers
from bench.lib.shapes import SHAPES, TOKENS_OF_DECODE
from secateur.formats.format import dequantised
from secateur.formats.kernels.decode24.arrange import FORMATS as KINDS
from secateur.formats.kernels.decode24.choose import choose
from secateur.formats.kernels.decode24.config import MOST_TOKENS, Case
from secateur.formats.kernels.decode24.tune import compile_all

WITHOUT_ZEROS = ("int4", "int4:channel", "int8")
FORMATS = (
    *("semi24", "semi24_int4", "semi24_int8", "semi24_fp8", "semi48", "semi48_int4"),
    *("int4", "int8"),
)
OF_EIGHT = "semi48"  # formats that begin so keep four of eight
IMPLEMENTATION = "decode"
REFERENCE = ("reference", None)
DEPENDENT = "SECATEUR_DEPENDENT"  # set to 0: kernels prepared now are launched plainly
LAUNCHES = "secateur.formats.kernels.decode24.multiply"

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


def ours(
    weight: Tensor, x: Tensor, format: str, tokens: Sequence[int], modes: Mapping[str, Launching]
) -> list[cold.Candidate]:
    """A `SparseLinear` that runs the decode kernel, in each mode on the same copies.

    On a CPU, where there is no decode kernel, it runs the reference.

    Raises: ValueError where the format or its decode kernel cannot run here.
    """
    layer = cold.packed_layer(weight, format)
    most = cold.most_tokens(layer, IMPLEMENTATION, tokens) if weight.is_cuda else None
    runs = "" if most else " reference"
    layer.use(((IMPLEMENTATION, most), REFERENCE) if most else (REFERENCE,))
    nbytes = layer.packed.nbytes

    def make() -> cold.Run:
        return deepcopy(layer)

    def exact(x: Tensor) -> Tensor:
        return cold.product(x, dequantised(layer.packed))

    candidate = cold.Candidate(format, nbytes, make, x, exact, CUBLAS, most=most)
    return [
        replace(candidate, name=f"{format}{runs}{mode}", around=around)
        for mode, around in modes.items()
    ]


def layer_of(name: str, arguments: argparse.Namespace) -> cold.Layer:
    """The layer's weights packed by everyone, with copies of each."""
    device, shape = torch.device(arguments.device), SHAPES[name]
    dense, sparse = cold.random_weights(shape, device)
    x = cold.random_inputs(max(arguments.tokens), shape[1], CUSPARSELT_ROWS, device)
    makers = dict(peers(dense, sparse, x, arguments.peers))
    modes: dict[str, Launching] = {"": nullcontext}
    if arguments.plain:
        modes[" plain"] = plainly
    _, eights = cold.random_weights(shape, device, 8)
    for format in arguments.formats:
        half = eights if format.startswith(OF_EIGHT) else sparse
        weight = dense if format in WITHOUT_ZEROS else half
        makers[format] = partial(ours, weight, x, format, arguments.tokens, modes)
    return cold.layer_from(name, shape, makers, int(1e9 * arguments.memory))


def compile_ours(arguments: argparse.Namespace, device: torch.device) -> None:
    """Compile all kernels that will be measured, in parallel, before any is needed."""
    cases = {
        Case(*KINDS[format], torch.bfloat16, *SHAPES[name], tokens).widest
        for name in arguments.layers
        for format in arguments.formats
        for tokens in arguments.tokens
        if format in KINDS and tokens <= MOST_TOKENS
    }
    compile_all([(case, choose(case, device)) for case in cases], device, None)


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the layers that they name."""
    parser = cold.parser_of("decode", __doc__, ["llama-3-8b"], TOKENS_OF_DECODE)
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--plain", action="store_true", help="also without dependent launch")
    parser.add_argument("--peers", type=Path, help="libsparse_marlin.so, its packer beside it")
    return cold.parsed(parser, words)


def main(words: Sequence[str] | None = None) -> int:
    """Measures, writes each case's rows as they come; 1 if the time budget left cases out."""
    arguments = parsed(words)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        compile_ours(arguments, device)
    return cold.measure("decode", arguments, layer_of)


if __name__ == "__main__":
    raise SystemExit(main())
