"""What a language model holds in memory once its layers are packed, and at most during a prompt.

    python -m bench.run.memory --model llama-3-8b --verb accelerate --tokens 1 2048

transformers' Llama at the model's sizes with random weights in bfloat16, every linear layer of its
blocks 2:4 by magnitude; head and embeddings stay as they are. `dense` is the same model with
nothing packed. Each configuration has a process of its own, so that nothing of another is in its
figures. The prompt is run once, as a generation begins: in inference mode, with a cache of keys and
values, and the last token's logits alone. Columns, in bytes: file, the weights that a folder of the
model would hold; held, its parameters and buffers in use; allocated, by torch's allocator on the
GPU after the prompt, when its results are gone; peak, while it ran; verb_peak, while layers were
packed. Also the seconds of the verb; packed, how many layers are; runs, what they run. One that
fails has its reason in `note`. A CPU has no such allocator, and no figures of it.
"""

import argparse
import gc
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from time import perf_counter

import torch
from torch import nn

import secateur as sc
from bench.lib.cold import FAILURES, REASON
from bench.lib.command import add_device, parser_of
from bench.lib.llama import BLOCKS, DENSE, FORMATS, MODELS, make_sparse, random_llama, tokens
from bench.lib.rows import Row, append
from secateur.accelerate.candidates import first_line
from secateur.formats.pack import bytes_of, linears_of

MEASURED = ("packed", "runs", "file", "held", "allocated", "peak", "verb_peak", "seconds", "note")


@dataclass(frozen=True)
class Case:
    """A configuration, `dense` or a format, of a model with this many blocks, and what packs it.

    `tokens` are those that `accelerate_` is told.
    """

    model: str
    blocks: int
    configuration: str
    verb: str
    tokens: tuple[int, ...]
    prompt: int


def sparse_llama(case: Case, device: str) -> nn.Module:
    """The model on its device, made 2:4 a layer at a time."""
    sizes = {**MODELS[case.model], "num_hidden_layers": case.blocks}
    model = random_llama(sizes, case.prompt, device).requires_grad_(False)
    make_sparse(model, block_layers(model), case.configuration)
    return model


def block_layers(model: nn.Module) -> list[str]:
    """The dense linear layers of the blocks: all but the head."""
    return [name for name in linears_of(model) if name.startswith(BLOCKS)]


def pack(model: nn.Module, case: Case) -> None:
    """Pack the layers of the blocks in the configuration's format, by its verb."""
    if case.configuration == DENSE:
        return
    names = block_layers(model)
    if case.verb == "pack":
        sc.pack_(model, case.configuration, names)
    else:
        sc.accelerate_(model, case.tokens, (case.configuration,), names)


def measured(case: Case, device: str) -> Row:
    """The configuration's figures, or the reason why there are none; of a process of its own."""
    try:
        return _measured(case, device)
    except FAILURES as problem:
        reason = f"{type(problem).__name__}: {first_line(problem)}"[:REASON]
        return {**dict.fromkeys(MEASURED, ""), "note": reason}


def _measured(case: Case, device: str) -> Row:
    model = sparse_llama(case, device)
    _settled(device)
    began = perf_counter()
    pack(model, case)
    seconds, verb_peak = perf_counter() - began, _peak(device)
    (prompt,) = tokens(int(MODELS[case.model]["vocab_size"]), 1, case.prompt, 1, device)
    _settled(device)
    with torch.inference_mode():
        model(prompt, use_cache=True, logits_to_keep=1)
    peak = _peak(device)
    packed = [module for module in model.modules() if isinstance(module, sc.SparseLinear)]
    kinds = Counter(f"{layer.format} {layer.dispatch}" for layer in packed)
    values = (
        len(packed),
        "; ".join(f"{count} {kind}" for kind, count in kinds.items()),
        sum(tensor.nbytes for tensor in model.state_dict().values()),
        bytes_of(model),
        _settled(device),
        peak,
        verb_peak,
        round(seconds, 1),
        "",
    )
    return dict(zip(MEASURED, values, strict=True))


def _settled(device: str) -> int | str:
    """The bytes that are allocated once all that is garbage is gone; the peak begins there."""
    gc.collect()
    if not device.startswith("cuda"):
        return ""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: str) -> int | str:
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else ""


def alone(case: Case, device: str) -> Row:
    """What `measured` gives in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(measured, case, device).result()
        except BrokenProcessPool as problem:  # it was killed, for want of memory most likely
            return {**dict.fromkeys(MEASURED, ""), "note": first_line(problem)[:REASON]}


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with the model's number of blocks and the prompt filled in."""
    parser = parser_of("memory", __doc__)
    add_device(parser)
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--blocks", type=int, help="instead of all")
    parser.add_argument(
        "--configurations",
        nargs="+",
        choices=(DENSE, *FORMATS),
        default=(DENSE, *FORMATS),
    )
    parser.add_argument("--verb", choices=("accelerate", "pack"), default="accelerate")
    parser.add_argument("--tokens", nargs="+", type=int, help="by default 1 and the prompt's")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens")
    arguments = parser.parse_args(words)
    arguments.blocks = arguments.blocks or MODELS[arguments.model]["num_hidden_layers"]
    arguments.tokens = tuple(arguments.tokens or (1, arguments.prompt))
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Measures, writes each row as it comes, and prints their path."""
    arguments = parsed(words)
    path = None
    for name in arguments.configurations:
        case = Case(
            *(arguments.model, arguments.blocks, name, arguments.verb),
            *(arguments.tokens, arguments.prompt),
        )
        found = alone(case, arguments.device)
        row = {**asdict(case), "tokens": " ".join(map(str, case.tokens)), **found}
        path = append(arguments.output, "memory", [row], arguments.device)
        print(f"{name}: {_summary(found)}", flush=True)
    print(path)
    return 0


def _summary(row: Row) -> str:
    if row["note"]:
        return str(row["note"])
    names = ("file", "held", "allocated", "peak", "verb_peak")
    sizes = [f"{name} {int(row[name]) / 1e9:.2f} GB" for name in names if row[name] != ""]
    return f"{', '.join(sizes)}, {row['seconds']} s, runs {row['runs'] or DENSE}"


if __name__ == "__main__":
    raise SystemExit(main())
