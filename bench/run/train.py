"""A linear layer's training step in 2:4 on a GPU, beside dense bf16 and dense FP8, and its packs.

    python -m bench.run.train
    python -m bench.run.train --packs

A row is one candidate at one layer and number of tokens; losing rows stay, and one that cannot run
or is wrong has its reason in `note`. A run is forward and backward, of input and weight, where the
gradient of the result is the result; zeros are chosen and packed anew in each. The error is that of
the input's gradient against float64 with the same zeros, or the same rounded numbers. Weights are
random and cold (`bench.lib.cold`), without a bias. A ratio is the time of dense bf16 over that of
the candidate in the same run.

FP8 is `torch._scaled_mm` on e4m3, with one scale for each tensor and all three products in it. Its
first row rounds weights, inputs and gradients within the run, as torch.compile has it; the
second multiplies what was rounded before, and is a bound for any recipe.

With `--packs` a run is the pass over a weight that packs it both ways; the ratio is that to reading
the weight and writing the packs once at the bandwidth of a copy.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from bench.lib import cold
from bench.lib.peer_kernels import CUBLAS
from bench.lib.rows import Row, append
from bench.lib.shapes import SHAPES
from secateur.formats import training
from secateur.formats.kernels import both_ways
from secateur.formats.kernels.both_ways import Selection
from secateur.formats.kernels.timing import chain, in_turns

LAYERS = ("llama-3-8b-ffn", "vit-l")
TOKENS = (4096, 16384)
PACKED = ((4096, 4096), (28672, 4096))
STEP = " forward + backward"
BASELINE = CUBLAS + STEP
FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of FP8
COPY = "copy"


def step(run: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> cold.Run:
    """Forward and backward of |y|^2 / 2; the result is the input's gradient."""

    def stepped(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf, trained = x.detach().requires_grad_(), weight.detach().requires_grad_()
            result = run(leaf, trained)
            return torch.autograd.grad(result, [leaf, trained], result.detach())[0]

    return stepped


def dense(weight: Tensor, x: Tensor) -> list[cold.Candidate]:
    """Torch's own linear."""

    def make() -> cold.Run:
        return step(torch.nn.functional.linear, weight.clone())

    exact = partial(of_input, forward=weight, backward=weight)
    return [cold.Candidate(BASELINE, weight.nbytes, make, x, exact, BASELINE)]


def sparse(weight: Tensor, x: Tensor, selection: Selection) -> list[cold.Candidate]:
    """The layer in 2:4, as kernels run it; on a CPU, for tests, as dense matrices do."""
    of_rows, of_columns = both_ways.reference.kept(weight, selection)
    forward = weight.masked_fill(~of_rows, 0)

    def make() -> cold.Run:
        return step(partial(training.linear, bias=None, selection=selection), weight.clone())

    exact = partial(of_input, forward=forward, backward=forward.masked_fill(~of_columns, 0))
    name = f"2:4 {selection.name.lower()}" + STEP
    return [cold.Candidate(name, weight.nbytes, make, x, exact, BASELINE)]


def of_input(x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
    """The input's gradient in float64; the result is rounded in between, as candidates do."""
    result = cold.product(x, forward).to(x.dtype)
    return cold.product(result, backward.t())


def fp8(weight: Tensor, x: Tensor, is_rounded: bool) -> list[cold.Candidate]:
    """Three products of e4m3 numbers, which are rounded within the run or before."""
    if not weight.is_cuda:
        raise ValueError("torch._scaled_mm needs a GPU")

    def make() -> cold.Run:
        own = weight.clone()
        return partial(fp8_step, own) if is_rounded else fp8_products(own, x)

    def exact(x: Tensor) -> Tensor:
        result = cold.product(as_fp8(x), as_fp8(weight)).to(x.dtype)
        return cold.product(as_fp8(result), as_fp8(weight).t())

    name = "fp8" if is_rounded else "fp8 products alone"
    return [cold.Candidate(name + STEP, weight.nbytes, make, x, exact, BASELINE)]


def scale_of(numbers: Tensor) -> Tensor:
    """What a tensor's codes are multiplied by: a power of two, as some tokens' alone would have."""
    return torch.exp2(torch.ceil(torch.log2(numbers.abs().amax().float() / LARGEST)))


def as_fp8(numbers: Tensor) -> Tensor:
    """The numbers that a tensor's codes stand for, in float64."""
    scale = scale_of(numbers)
    return (numbers.float() / scale).to(FP8).double() * scale


@cache
def rounded() -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Codes of a matrix, of its transpose, and their scale, in few passes."""

    def both(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = scale_of(numbers)
        codes = (numbers.float() / scale).to(FP8)
        return codes, codes.t().contiguous(), scale

    compiled: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] = torch.compile(both, dynamic=True)
    return compiled


def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """`a @ b.T` of codes, in bfloat16."""
    result: Tensor = torch._scaled_mm(
        *(a, b.t()),
        scale_a=scale_a,
        scale_b=scale_b,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return result


def fp8_step(weight: Tensor, x: Tensor) -> Tensor:
    """A step whose operands are rounded within."""
    w, w_t, w_scale = rounded()(weight)
    q, q_t, q_scale = rounded()(x)
    result = product(q, w, q_scale, w_scale)
    g, g_t, g_scale = rounded()(result)
    product(g_t, q_t, g_scale, q_scale)
    return product(g, w_t, g_scale, w_scale)


def fp8_products(weight: Tensor, x: Tensor) -> cold.Run:
    """A step whose operands were rounded before; other numbers of tokens have their own."""
    w, w_t, w_scale = rounded()(weight)

    @cache
    def operands(tokens: int) -> tuple[Tensor, ...]:
        given = rounded()(x[:tokens])
        return *given, *rounded()(product(given[0], w, given[2], w_scale))

    def run(x: Tensor) -> Tensor:
        q, q_t, q_scale, g, g_t, g_scale = operands(len(x))
        product(q, w, q_scale, w_scale)
        product(g_t, q_t, g_scale, q_scale)
        return product(g, w_t, g_scale, w_scale)

    return run


def layer_of(name: str, arguments: argparse.Namespace) -> cold.Layer:
    """The layer's candidates, with copies of each."""
    device, shape = torch.device(arguments.device), SHAPES[name]
    weight, _ = cold.random_weights(shape, device)
    x = cold.random_inputs(max(arguments.tokens), shape[1], 1, device)
    makers: dict[str, Callable[[], list[cold.Candidate]]] = {
        BASELINE: lambda: dense(weight, x),
        "fp8" + STEP: lambda: fp8(weight, x, True),
        "fp8 products alone" + STEP: lambda: fp8(weight, x, False),
        **{f"2:4 {s.name.lower()}" + STEP: partial(sparse, weight, x, s) for s in Selection},
    }
    return cold.layer_from(name, shape, makers, int(1e9 * arguments.memory))


def packs(arguments: argparse.Namespace) -> int:
    """Measures the passes over weights, and writes their rows."""
    device, path = torch.device(arguments.device), None
    for shape in PACKED:
        rows = list(packs_of(shape, device, arguments.rounds))
        path = append(arguments.output, "train", rows, arguments.device)
        for row in rows:
            print(row["candidate"], row["us"], row["vs_cublas"], flush=True)
    print(path)
    return 0


def packs_of(shape: tuple[int, int], device: torch.device, rounds: int) -> Iterator[Row]:
    """A row for each selection and type of the weight, and one for a copy of as many bytes."""
    weight, _ = cold.random_weights(shape, device)
    pack = both_ways.pack if weight.is_cuda else both_ways.reference.pack
    chains, nbytes = {}, {}
    held = []  # graphs read it, and do not keep it
    for stored in (torch.bfloat16, torch.float32):
        moved = weight.numel() * (stored.itemsize + 9 / 4)
        copies = [weight.to(stored, copy=True) for _ in range(cold.copies_for(int(moved), 10**10))]
        short = str(stored).removeprefix("torch.")
        halves = [weight.new_zeros(int(moved) // 2, dtype=torch.uint8) for _ in copies]
        chains[f"{COPY} {short}"] = chain(
            [
                partial(into.copy_, one)
                for into, one in zip(halves, halves[1:] + halves[:1], strict=True)
            ],
            device,
        )
        held += [*copies, *halves]
        for selection in Selection:
            runs = [partial(pack, one, torch.bfloat16, selection) for one in copies]
            chains[f"pack {selection.name.lower()} {short}"] = chain(runs, device)
        nbytes |= dict.fromkeys(chains.keys() - nbytes.keys(), moved)
    timings = in_turns(chains, device, rounds)
    for name, timing in timings.items():
        copied = f"{COPY} {name.split()[-1]}"
        yield {
            **{"layer": f"{shape[0]} x {shape[1]}", "out": shape[0], "in": shape[1], "tokens": ""},
            **dict.fromkeys((*cold.CLOCKS, *cold.MEASURED), ""),
            "candidate": name,
            "dtype": name.split()[-1],
            "us": f"{timing.median_us:.3f}",
            "low_us": f"{timing.low_us:.3f}",
            "high_us": f"{timing.high_us:.3f}",
            "rounds": timing.rounds,
            "launches": chains[name].launches,
            "tb_s": f"{nbytes[name] / timing.median_us / 1e6:.3f}",
            "baseline": copied,
            "vs_cublas": f"{timings[copied].median_us / timing.median_us:.3f}",
        }


def main(words: Sequence[str] | None = None) -> int:
    """Measures, writes each case's rows as they come; 1 if the time budget left cases out."""
    parser = cold.parser_of("train", __doc__, LAYERS, TOKENS)
    parser.add_argument("--packs", action="store_true", help="the pass that packs a weight")
    arguments = cold.parsed(parser, words)
    return packs(arguments) if arguments.packs else cold.measure("train", arguments, layer_of)


if __name__ == "__main__":
    raise SystemExit(main())
