"""SAM ViT-h's image encoder end to end on a GPU, dense, int8, 2:4 and mixed.

    python -m bench.run.vit --batch 1 32

The architecture is transformers', the weights random from a fixed seed, in bfloat16; a
configuration makes its layers 2:4 by magnitude and packs them. Each layer of the encoder is
compiled with `max_autotune`, in the dense configuration too, and the whole call is captured in one
CUDA graph: equal layers are compiled once, and no launch waits for Python. Columns: images a second
from the median of `rounds` calls between CUDA events; the largest memory allocated while the graph
is captured and replayed; error = ||y - y'|| / ||y'|| to the output y' of the same pruned weights,
dense and eager, an image at a time; seconds of the first compiled call; what the layers run. One
that fails has its reason in `note`. `--tiny` is a smoke test, on a CPU if need be: sizes of a toy,
traced and not compiled.
"""

import argparse
import gc
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles
from time import monotonic, perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from bench.lib.cold import FAILURES, REASON, error
from bench.lib.command import parser_of
from bench.lib.configurations import CONFIGURATIONS, EVERYTHING, Configuration, named, prune
from bench.lib.rows import Row, append
from secateur.accelerate.candidates import first_line
from secateur.core.undo import Undo
from secateur.formats.fuse import fuse_activations_

FOR_MANY = ("prefill", "cusparselt")  # implementations for many tokens, the preferred first
# `max-autotune`, whose Triton products are left out: they lost to cuBLAS at each of this encoder's
# shapes at batch 32 (bench/results/archive/autotune_*.csv), and comparing them takes minutes.
OPTIONS = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN"}
STD = 0.02  # transformers' own default of 1e-10 would leave nothing of the layers
ROUNDS = 20
ABSENT = "bench.run.vit needs transformers for SAM's image encoder: pip install 'secateur[hf]'"


@dataclass(frozen=True)
class Sizes:
    """An image encoder of SAM's; an image has `pixels` rows and columns in patches of 16."""

    name: str
    hidden: int
    layers: int
    heads: int
    mlp: int
    pixels: int
    channels: int
    attends_globally: tuple[int, ...]
    window: int = 14
    patch: int = 16

    def tokens(self, batch: int) -> tuple[int, int]:
        """Of a call of an MLP or a global attention, and of one in windows, padded to whole ones.

        Both ascend, and all layers of the encoder see one of them.
        """
        side = self.pixels // self.patch
        padded = -(-side // self.window) * self.window
        return batch * side**2, batch * padded**2


VIT_H = Sizes("SAM ViT-h", 1280, 32, 16, 5120, 1024, 256, (7, 15, 23, 31))
TINY = Sizes("tiny", 64, 2, 2, 256, 64, 32, (1,))


class Encoder(nn.Module):
    """transformers' image encoder of SAM as a function of pixels; random weights from a seed."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        from transformers import SamVisionConfig
        from transformers.models.sam.modeling_sam import SamVisionEncoder

        super().__init__()
        config = SamVisionConfig(
            hidden_size=sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            mlp_dim=sizes.mlp,
            image_size=sizes.pixels,
            patch_size=sizes.patch,
            window_size=sizes.window,
            global_attn_indexes=list(sizes.attends_globally),
            output_channels=sizes.channels,
        )
        with torch.device("meta"):
            encoder = SamVisionEncoder(config)
        self.encoder: nn.Module = encoder.to(torch.bfloat16).to_empty(device=device).eval()
        generator = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.encoder.named_parameters():
                parameter.normal_(0, STD, generator=generator)
                if name.endswith("weight") and parameter.dim() == 1:  # of a norm
                    parameter.add_(1)

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.encoder(pixels).last_hidden_state
        return features


def pack(model: nn.Module, configuration: Configuration, tokens: Sequence[int]) -> None:
    """Pack the configuration's layers, and load what they run."""
    for globs, format in configuration.packed.items():
        sc.pack_(model, format, named(model, globs))
    for layer in packed_layers(model):
        known = {entry.name: entry for entry in layer.format.implementations}
        able = [
            name
            for name in FOR_MANY
            if name in known and known[name].why_not(layer.packed, max(tokens)) is None
        ]
        if able:
            layer.use(((able[0], None),))
    if configuration.tried:
        sc.accelerate_(model, tokens, configuration.tried, named(model, EVERYTHING))
    fuse_activations_(model, Undo())
    if packed_layers(model):
        sc.warmup(model, tokens)


def packed_layers(model: nn.Module) -> list[sc.SparseLinear]:
    """The packed layers of the model."""
    return [module for module in model.modules() if isinstance(module, sc.SparseLinear)]


def runs(model: nn.Module) -> str:
    """How many layers run what."""
    kinds = Counter(
        f"{module.format} {module.dispatch}" if isinstance(module, sc.SparseLinear) else "dense"
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )
    return "; ".join(f"{count} {kind}" for kind, count in kinds.items())


def images(sizes: Sizes, batch: int, device: torch.device) -> Tensor:
    """Random pixels from a fixed seed."""
    generator = torch.Generator(device).manual_seed(1)
    shape = (batch, 3, sizes.pixels, sizes.pixels)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)


def milliseconds(call: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    """Of each call: between CUDA events, or by the clock on a CPU."""
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            started = perf_counter()
            call()
            times.append(1e3 * (perf_counter() - started))
    return times


def compile_(model: Encoder, sizes: Sizes) -> None:
    """Compile each layer as one graph; the smoke test's are only traced."""
    for layer in model.encoder.layers:
        if sizes is TINY:
            layer.compile(backend="eager", fullgraph=True)
        else:
            layer.compile(options=OPTIONS, fullgraph=True)


def captured(model: nn.Module, pixels: Tensor) -> Callable[[], object]:
    """The call as one CUDA graph; on a CPU as it is."""
    if not pixels.is_cuda:
        return lambda: model(pixels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(pixels)
    return graph.replay


MEASURED = (
    *("img_s", "ms", "low_ms", "high_ms", "rounds", "peak_mib", "error", "compile_s"),
    *("runs", "note"),
)


def measured(
    configuration: Configuration, sizes: Sizes, batch: int, device: torch.device, rounds: int
) -> Row:
    """The figures of one configuration.

    Raises: what torch, the library or the GPU raise where it cannot run.
    """
    model, pixels = Encoder(sizes, device), images(sizes, batch, device)
    prune(model, configuration)
    expected = torch.cat([model(image) for image in pixels.split(1)]).double()
    pack(model, configuration, sizes.tokens(batch))
    compile_(model, sizes)
    began = perf_counter()
    off = error(model(pixels), expected)  # waits for the result
    seconds = perf_counter() - began
    del expected
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    call = captured(model, pixels)
    milliseconds(call, device, 2)
    times = milliseconds(call, device, rounds)
    low, median, high = quantiles(times, n=4, method="inclusive")
    values = (
        f"{1e3 * batch / median:.3f}",
        f"{median:.3f}",
        f"{low:.3f}",
        f"{high:.3f}",
        rounds,
        f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f}" if cuda else "",
        f"{off:.2e}",
        f"{seconds:.1f}",
        runs(model),
        "",
    )
    return dict(zip(MEASURED, values, strict=True))


def row(name: str, sizes: Sizes, batch: int, device: torch.device, rounds: int) -> Row:
    """The configuration's figures, or the reason why there are none."""
    shared: Row = {"model": sizes.name, "configuration": name, "batch": batch}
    try:
        found = measured(CONFIGURATIONS[name], sizes, batch, device, rounds)
    except FAILURES as problem:
        reason = f"{type(problem).__name__}: {first_line(problem)}"[:REASON]
        found = {**dict.fromkeys(MEASURED, ""), "note": reason}
    torch.compiler.reset()  # the graphs hold the model and its memory
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {**shared, **found}


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the encoder's sizes and the device."""
    parser = parser_of("vit", __doc__)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument(
        "--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS)
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at least 2")
    parser.add_argument("--time-budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--tiny", action="store_true", help="a smoke test")
    arguments = parser.parse_args(words)
    arguments.sizes = TINY if arguments.tiny else VIT_H
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if min(arguments.batch) < 1 or arguments.rounds < 2:
        parser.error("--batch needs numbers from 1, --rounds one from 2 upwards")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("ViT-h needs a CUDA GPU, none is here: --tiny runs on a CPU")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Measures, writes each row as it comes; 1 if the time budget left rows out, 2 if none ran."""
    arguments = parsed(words)
    if importlib.util.find_spec("transformers") is None:
        print(ABSENT, file=sys.stderr)
        return 2
    device = torch.device(arguments.device)
    began, path, left = monotonic(), None, list[str]()
    with torch.no_grad():
        for batch in arguments.batch:
            for name in arguments.configurations:
                if monotonic() - began > arguments.time_budget:
                    left.append(f"{name}, batch {batch}")
                    continue
                found = row(name, arguments.sizes, batch, device, arguments.rounds)
                path = append(arguments.output, "vit", [found], arguments.device)
                print(f"{monotonic() - began:.0f} s, {_summary(found)}", flush=True)
    if left:
        print(f"out of time, left out: {'; '.join(left)}")
    print(path)
    return int(bool(left))


def _summary(row: Row) -> str:
    place = f"batch {row['batch']}, {row['configuration']}"
    if not row["img_s"]:
        return f"{place}: {row['note']}"
    return (
        f"{place}: {row['img_s']} img/s, {row['peak_mib'] or '-'} MiB, error {row['error']}, "
        f"compiled in {row['compile_s']} s, runs {row['runs']}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
