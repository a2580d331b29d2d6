"""What pruning a language model takes: seconds and memory of each method, at real sizes.

    python -m bench.run.cost --model llama-3-8b --methods sparsegpt alps
    python -m bench.run.cost --model llama-3-8b --methods alps --stream FOLDER

transformers' Llama at the model's sizes with random weights in bfloat16, and random tokens; every
linear layer of the blocks is made 2:4. Columns: seconds of the whole verb; announced, what `best`
and `thorough` say before that they will take; peak_gib, the most
memory allocated on the GPU while it ran, the model included; error, the mean share of the layers'
output energy that is lost, which on random weights says only that it ran. `--offload` keeps
activations on the host. `--stream` writes the dense model into that folder first and reconstructs
it from there into another one, a block at a time.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from time import perf_counter

import torch
from torch import Tensor, nn

import secateur as sc
from bench.lib.command import add_device, parser_of
from bench.lib.llama import MODELS, random_llama, tokens
from bench.lib.rows import append
from secateur.files.stream import reconstruct_folder
from secateur.model.plan import match
from secateur.prune.report import PruneReport
from secateur.reconstruct import Blockwise, estimate

METHODS = {
    "sparsegpt": sc.sparsegpt,
    "refit(sparsegpt)": sc.refit(sc.sparsegpt),
    "alps": sc.alps,
    "best": sc.best,
    "thorough": sc.thorough,
}


def options_of(words: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("cost", __doc__)
    add_device(parser)
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--blocks", type=int, help="instead of all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["sparsegpt", "alps"])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--stream", type=Path)
    return parser.parse_args(words)


def announced_by(method: str, model: nn.Module, plan: sc.Plan, data: list[Tensor]) -> float | str:
    """The seconds that a preset says that it will take; empty for what says nothing."""
    algorithm = METHODS[method]
    if not isinstance(algorithm, Blockwise):
        return ""
    return estimate(model, match(model, plan), plan.layers, data, algorithm).seconds


def streamed(
    method: str, plan: sc.Plan, data: list[Tensor], options: argparse.Namespace
) -> PruneReport:
    """Reconstruct the folder into another one, which is thrown away."""
    target = options.stream.with_name(f"{options.stream.name}-sparse")
    report = reconstruct_folder(
        options.stream, target, plan, METHODS[method], data, device=options.device
    )
    shutil.rmtree(target)
    return report


def row_of(
    method: str, sizes: Mapping[str, int | float], options: argparse.Namespace
) -> dict[str, object]:
    """What the method takes, on a model of its own."""
    model = random_llama(dict(sizes), options.length, options.device)
    model.to(getattr(torch, options.dtype))
    plan = sc.plan(model, "2:4")
    placed = options.device if options.stream is None else "cpu"
    data = tokens(int(sizes["vocab_size"]), options.rows, options.length, options.batch, placed)
    announced: float | str = ""
    if options.stream is None:
        announced = announced_by(method, model, plan, data)
    else:
        model.save_pretrained(options.stream)  # type: ignore[operator]
        del model
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = perf_counter()
    if options.stream is None:
        report = sc.reconstruct_(model, plan, METHODS[method], data, offload=options.offload)
    else:
        report = streamed(method, plan, data, options)
    seconds = perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else ""
    return {
        "blocks": sizes["num_hidden_layers"],
        "layers": len(report.layers),
        "method": method,
        "announced": announced,
        "seconds": seconds,
        "peak_gib": peak,
        "error": fmean(layer.error or 0.0 for layer in report.layers),
    }


def main(words: Sequence[str] | None = None) -> None:
    options = options_of(words)
    sizes = dict(MODELS[options.model])
    sizes["num_hidden_layers"] = options.blocks or sizes["num_hidden_layers"]
    shared = {name: getattr(options, name) for name in ("model", "rows", "length", "batch")}
    shared |= {"offload": options.offload, "streamed": options.stream is not None}
    shared["dtype"] = options.dtype
    for method in options.methods:
        row = row_of(method, sizes, options)
        append(options.output, "cost", [{**shared, **row}], options.device)
        print(f"{method}: {row['seconds']:.1f} s, {row['peak_gib']} GiB", flush=True)


if __name__ == "__main__":
    main()
