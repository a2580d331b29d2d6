"""Whether a budget of milliseconds is met: the plan's predicted time beside that of all its layers.

    python -m bench.run.budget --model llama-3-8b --tokens 16 --shares 0.6,0.7,0.8,0.9

Random layers of the model's shapes, some blocks of them, whose sensitivities differ. For each share
of the dense time: what `costs.allocate_milliseconds` finds within it; then the layers themselves,
pruned to it and accelerated with the same tokens and formats, and one call of all of them one after
another, timed as a whole beside the dense ones (on a GPU in a CUDA graph, the weights cold because
together no cache holds them). Columns: budget_ms; sum_ms, of the layers timed one by one;
planned_ms, as the allocation measured it; measured_ms; the same three of the dense layers; and
over = measured / budget - 1.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn

import secateur as sc
from bench.lib.command import add_device, parser_of
from bench.lib.rows import Row, append
from bench.lib.shapes import SHAPES, layers_of
from secateur.allocation import Sensitivity, costs
from secateur.formats.kernels.timing import Timing, compare

PATTERNS = ("2:4", "block:64x64@0.75", "block:64x64@0.9", "unstructured:0.7", "unstructured:0.95")


def layers(model: str, blocks: int, dtype: torch.dtype, device: str) -> nn.ModuleList:
    """Linear layers of the model's shapes, those of each block of other magnitudes."""
    generator = torch.Generator().manual_seed(0)
    found = nn.ModuleList()
    for block in range(blocks):
        for i, name in enumerate(layers_of(model)):
            out, width = SHAPES[name]
            linear = nn.Linear(width, out, bias=False, dtype=dtype)
            weight = torch.randn(out, width, generator=generator) * (1 + (5 * block + 3 * i) % 4)
            with torch.no_grad():
                linear.weight.copy_(weight / width**0.5)
            found.append(linear)
    return found.to(device)


def energy(model: nn.Module) -> float:
    """Minus the energy of all weights: what pruning takes away, and larger layers lose more."""
    return -sum(float(p.detach().float().square().sum()) for p in model.parameters())


Models = Mapping[str, nn.ModuleList]


def timed(models: Models, inputs: Sequence[Tensor]) -> Mapping[str, Timing]:
    """The time of one call of all layers of each model, in turns."""

    def call(model: nn.ModuleList) -> list[Tensor]:
        with torch.no_grad():
            return [layer(x) for layer, x in zip(model, inputs, strict=True)]

    variants = {name: [partial(call, one)] for name, one in models.items()}
    return compare(variants, inputs[0].device)


def row_of(
    dense: nn.ModuleList,
    curves: Sensitivity,
    budget: float,
    inputs: Sequence[Tensor],
    formats: Sequence[str] | None,
) -> Row:
    """A row: the plan that is found within the budget of milliseconds, and what it takes.

    Raises: ValueError where nothing is found.
    """
    tokens = (len(inputs[0]),)
    begin = perf_counter()
    found = costs.allocate_milliseconds(dense, curves, budget, tokens, formats)
    choice_seconds = perf_counter() - begin
    print(found, flush=True)
    table = costs.milliseconds(dense, curves, tokens, formats)
    model = copy.deepcopy(dense)
    sc.prune_(model, sc.plan(model, found.patterns))
    sc.accelerate_(model, tokens, formats)
    timings = timed({"dense": dense, "plan": model}, inputs)
    taken = timings["plan"].median_us / 1e3
    return {
        "budget_ms": budget,
        "sum_ms": table.total(found.best.choices),
        "planned_ms": found.best.cost,
        "measured_ms": taken,
        "spread": timings["plan"].spread,
        "dense_sum_ms": table.dense,
        "planned_dense_ms": found.dense,
        "dense_ms": timings["dense"].median_us / 1e3,
        "over": taken / budget - 1,
        "choice_seconds": choice_seconds,
    }


def main() -> None:
    parser = parser_of("budget", __doc__)
    add_device(parser)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--shares", default="0.6,0.7,0.8,0.9", help="of the dense time")
    parser.add_argument("--formats", default=None, help="as for accelerate_, by commas")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()

    dense = layers(options.model, options.blocks, getattr(torch, options.dtype), options.device)
    formats = options.formats.split(",") if options.formats else None
    curves = sc.sensitivity(dense, PATTERNS, energy)
    inputs = [
        torch.randn(options.tokens, linear.in_features, device=options.device).to(linear.weight)
        for linear in dense
    ]
    shared: Row = {"model": options.model, "layers": len(dense), "dtype": options.dtype}
    dense_ms = timed({"dense": dense}, inputs)["dense"].median_us / 1e3
    for share in map(float, options.shares.split(",")):
        try:
            row = row_of(dense, curves, share * dense_ms, inputs, formats)
        except ValueError as error:
            print(f"{share}: {error}", flush=True)
            continue
        row = {**shared, "tokens": options.tokens, "share": share, **row}
        append(options.output, "budget", [row], options.device)
        said = f"budget {row['budget_ms']:.4f} ms, measured {row['measured_ms']:.4f} ms"
        print(f"{said} ({row['over']:+.1%})", flush=True)


if __name__ == "__main__":
    main()
