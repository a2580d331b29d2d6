"""Tokens a second of a language model: our own steps, dense and 2:4, beside transformers' generate.

    python -m bench.run.llm --model llama-3-8b --formats dense semi24 semi24_int4 --head semi24_int4

transformers' Llama at the model's sizes with random weights in bfloat16, every linear layer of its
blocks 2:4 by magnitude, packed in the format; `dense` packs nothing. `--head` makes the head 2:4
and packs it, too, in the rows that are not dense. A row is one configuration: tokens, the new ones
that the time is of, after `prompt` tokens; ms, of a token of all sequences, the median of `rounds`;
tokens_s, of all sequences together; first_ms, until the first token is there; allocated and peak
bytes, by torch's allocator; runs, what made the tokens. `transformers` is its own `generate` of the
dense model with a static cache, which it compiles, in a process that has run it once. One that
fails has its reason in `note`. `--profile` prints what a token's time goes to, by kernel.
"""

import argparse
import gc
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

import secateur as sc
from bench.lib.cold import FAILURES, REASON
from bench.lib.command import add_device, parser_of
from bench.lib.llama import BLOCKS, DENSE, FORMATS, MODELS, make_24, random_llama, tokens
from bench.lib.rows import Row, append
from secateur.accelerate.candidates import first_line
from secateur.formats.pack import linears_of
from secateur.llm.kernel_steps import KernelSteps

TRANSFORMERS = "transformers"
HEAD = "lm_head"
MEASURED = ("ms", "tokens_s", "first_ms", "allocated", "peak", "runs", "note")
PROFILED = 8  # steps


def llama(model: str, blocks: int, length: int, format: str, head: str, device: str) -> nn.Module:
    """The model with its layers packed in the format, and the head where `head` names one."""
    sizes = {**MODELS[model], "num_hidden_layers": blocks}
    made = random_llama(sizes, length, device).requires_grad_(False)
    if format == DENSE:
        return made
    of_blocks = [name for name in linears_of(made) if name.startswith(BLOCKS)]
    packed = {format: of_blocks, **({head: [HEAD]} if head != DENSE else {})}
    if head == format:
        packed = {format: [*of_blocks, HEAD]}
    make_24(made, [name for names in packed.values() for name in names])
    for one, names in packed.items():
        sc.pack_(made, one, names)
    return made


def measured(arguments: argparse.Namespace, format: str) -> Row:
    """The configuration's figures, or the reason why there are none."""
    _settled(arguments.device)
    try:
        if format == TRANSFORMERS:
            return _by_transformers(arguments)
        return _by_steps(arguments, format)
    except FAILURES as problem:
        reason = f"{type(problem).__name__}: {first_line(problem)}"[:REASON]
        return {**dict.fromkeys(MEASURED, ""), "note": reason}


def _by_steps(arguments: argparse.Namespace, format: str) -> Row:
    model, ids = _model_and_ids(arguments, format)
    steps, count = KernelSteps(model), arguments.tokens
    length = arguments.prompt + count
    steps.start(ids, None, length)

    def first() -> Tensor:
        return steps.start(ids, None, length).argmax(-1)

    firsts, each = list[float](), list[float]()
    _settled(arguments.device)
    for _ in range(arguments.rounds):
        seconds, chosen = _timed(first, arguments.device)
        firsts.append(seconds)
        seconds, _ = _timed(lambda chosen=chosen: steps.greedy(chosen, count - 1), arguments.device)
        each.append(seconds / (count - 1))
    if arguments.profile:
        _profile(lambda: steps.greedy(first(), PROFILED))
    return _row(arguments, each, firsts, steps.about)


def _by_transformers(arguments: argparse.Namespace) -> Row:
    model, ids = _model_and_ids(arguments, DENSE)
    count = arguments.tokens

    def generate(new: int) -> Tensor:
        made: Tensor = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            **{"max_new_tokens": new, "min_new_tokens": new, "do_sample": False},
            cache_implementation="static",
            max_length=None,
            pad_token_id=0,
        )
        return made

    generate(count)  # compiles
    generate(count)  # captures
    firsts, each = list[float](), list[float]()
    _settled(arguments.device)
    for _ in range(arguments.rounds):
        seconds, _ = _timed(lambda: generate(1), arguments.device)
        firsts.append(seconds)
        whole, _ = _timed(lambda: generate(count), arguments.device)
        each.append((whole - seconds) / (count - 1))
    return _row(arguments, each, firsts, "generate, static cache, compiled")


def _model_and_ids(arguments: argparse.Namespace, format: str) -> tuple[nn.Module, Tensor]:
    told = arguments.model, arguments.blocks, arguments.prompt + arguments.tokens
    model = llama(*told, format, arguments.head, arguments.device)
    vocabulary = int(MODELS[arguments.model]["vocab_size"])
    (ids,) = tokens(
        vocabulary, arguments.batch, arguments.prompt, arguments.batch, arguments.device
    )
    return model, ids


def _row(
    arguments: argparse.Namespace, each: Sequence[float], firsts: Sequence[float], runs: str
) -> Row:
    peak: int | str = ""
    allocated: int | str = ""
    if arguments.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(arguments.device)
        allocated = torch.cuda.memory_allocated(arguments.device)
    values = (
        round(1e3 * median(each), 4),
        round(arguments.batch / median(each), 1),
        round(1e3 * median(firsts), 2),
        *(allocated, peak, runs, ""),
    )
    return dict(zip(MEASURED, values, strict=True))


def _timed(call: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """Seconds of the call until its result is there, and the result."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    began = perf_counter()
    result = call()
    result.cpu()
    return perf_counter() - began, result


def _settled(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _profile(call: Callable[[], object]) -> None:
    """Prints the kernels of the steps by the time that they take, in microseconds a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    times, counts = Counter[str](), Counter[str]()
    for event in profile.events():
        times[event.name] += event.device_time / PROFILED
        counts[event.name] += 1
    for name, us in times.most_common(25):
        print(f"{us:10.1f} us a step in {counts[name] / PROFILED:7.1f} launches: {name[:90]}")


def main(words: Sequence[str] | None = None) -> int:
    """Measures, writes each row as it comes, and prints their path."""
    parser = parser_of("llm", __doc__)
    add_device(parser)
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--blocks", type=int, help="instead of all")
    known = (TRANSFORMERS, DENSE, *FORMATS)
    parser.add_argument("--formats", nargs="+", choices=known, default=known)
    parser.add_argument("--head", choices=(DENSE, *FORMATS), default=DENSE)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args(words)
    arguments.blocks = arguments.blocks or int(MODELS[arguments.model]["num_hidden_layers"])
    path = None
    for format in arguments.formats:
        found = measured(arguments, format)
        names = ("model", "blocks", "batch", "prompt", "tokens", "rounds")
        head = DENSE if format in (DENSE, TRANSFORMERS) else arguments.head
        told = {name: getattr(arguments, name) for name in names}
        row = {"format": format, "head": head, **told, **found}
        path = append(arguments.output, "llm", [row], arguments.device)
        print(
            ", ".join(f"{name} {row[name]}" for name in ("format", "head", *MEASURED)), flush=True
        )
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
