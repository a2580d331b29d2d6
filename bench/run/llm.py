"""Tokens a second of a language model: our own steps, dense and 2:4, beside transformers' generate.

    python -m bench.run.llm --model llama-3-8b --formats dense semi24 semi24_int4 --head semi24_int4

transformers' Llama at the model's sizes with random weights, every linear layer of its blocks
packed in the format, pruned by magnitude to what it stores, of blocks 80 %; `dense` packs nothing,
`int4` and `int8` round dense weights. `--head` packs the head, too, pruned likewise, in the rows
that are not dense. A row is one
configuration: tokens, the new ones that the time is of, after `prompt` tokens; ms, of a token of
all sequences, the median of `rounds`; tokens_s, of all sequences together; first_ms, until the
first token is there; allocated and peak bytes, by torch's allocator; runs, what made the tokens.
The loop is `steps`, the library's own; `generate`, transformers' with a static cache, which it
compiles, after it has run twice; or `custom_generate`, transformers' with the library's steps in
it. A configuration that fails has its reason in `note`. `--profile` prints what a token's time goes
to, by kernel.
"""

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

import secateur as sc
from bench.lib.cold import FAILURES, REASON
from bench.lib.command import add_device, parser_of
from bench.lib.llama import (
    BLOCKS,
    BLOCKS_OF_64,
    DENSE,
    FORMATS,
    MODELS,
    WITHOUT_ZEROS,
    make_sparse,
    random_llama,
    tokens,
)
from bench.lib.rows import Row, append
from secateur.accelerate.candidates import first_line
from secateur.formats.pack import linears_of
from secateur.llm import custom_generate
from secateur.llm.kernel_steps import steps_of

DYNAMIC = ("int8_dynamic", "semi24_int8_dynamic", "fp8_dynamic", "semi24_fp8_dynamic")
STEPS, GENERATE, CUSTOM = "steps", "generate", "custom_generate"
HEAD = "lm_head"
MEASURED = ("ms", "tokens_s", "first_ms", "allocated", "peak", "runs", "note")
PROFILED = 8  # steps
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def llama(
    sizes: dict[str, int | float],
    length: int,
    format: str,
    head: str,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """The model with its layers packed in the format, and the head where `head` names one."""
    made = random_llama(sizes, length, device, dtype).requires_grad_(False)
    if format == DENSE:
        return made
    of_blocks = [name for name in linears_of(made) if name.startswith(BLOCKS)]
    packed = {format: of_blocks, **({head: [HEAD]} if head != DENSE else {})}
    if head == format:
        packed = {format: [*of_blocks, HEAD]}
    for one, names in packed.items():
        if one.startswith("semi24") or one == BLOCKS_OF_64:
            make_sparse(made, names, one)
    for one, names in packed.items():
        sc.pack_(made, one, names)
    return made


@dataclass(frozen=True)
class Case:
    """What is asked of a model: `tokens` new ones of each prompt, by which loop."""

    loop: str
    batch: int
    prompt: int
    tokens: int
    rounds: int
    device: str

    def ids(self, vocabulary: int) -> Tensor:
        """Random prompts."""
        (ids,) = tokens(vocabulary, self.batch, self.prompt, self.batch, self.device)
        return ids


def measured(case: Case, model: nn.Module) -> Row:
    """The configuration's figures, or the reason why there are none."""
    _settled(case.device)
    ids = case.ids(int(model.config.vocab_size))  # type: ignore[union-attr, arg-type]
    try:
        if case.loop == STEPS:
            return _by_steps(case, model, ids)
        return _by_transformers(case, model, ids)
    except FAILURES as problem:
        reason = f"{type(problem).__name__}: {first_line(problem)}"[:REASON]
        return {**dict.fromkeys(MEASURED, ""), "note": reason}


def _by_steps(case: Case, model: nn.Module, ids: Tensor) -> Row:
    steps, count, length = steps_of(model), case.tokens, case.prompt + case.tokens
    steps.greedy(steps.start(ids, None, length).argmax(-1), 1)

    def first() -> Tensor:
        return steps.start(ids, None, length).argmax(-1)

    firsts, each = list[float](), list[float]()
    _settled(case.device)
    for _ in range(case.rounds):
        seconds, chosen = _timed(first, case.device)
        firsts.append(seconds)
        seconds, _ = _timed(lambda chosen=chosen: steps.greedy(chosen, count - 1), case.device)
        each.append(seconds / (count - 1))
    return _row(case, each, firsts, steps.about)


def _by_transformers(case: Case, model: nn.Module, ids: Tensor) -> Row:
    how: dict[str, object] = {"custom_generate": custom_generate}
    if case.loop == GENERATE:
        how = {"cache_implementation": "static", "compile_config": _compiled(case.device)}

    def generate(new: int) -> Tensor:
        made: Tensor = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            **{"max_new_tokens": new, "min_new_tokens": None, "do_sample": False, **how},
            max_length=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        return made

    generate(case.tokens)  # compiles
    generate(case.tokens)  # captures
    firsts, each = list[float](), list[float]()
    _settled(case.device)
    for _ in range(case.rounds):
        seconds, _ = _timed(lambda: generate(1), case.device)
        firsts.append(seconds)
        whole, made = _timed(lambda: generate(case.tokens), case.device)
        assert made.shape[1] == case.prompt + case.tokens
        each.append((whole - seconds) / (case.tokens - 1))
    return _row(
        case,
        each,
        firsts,
        "transformers' generate, static cache, compiled"
        if case.loop == GENERATE
        else "transformers' generate, this library's steps",
    )


def _compiled(device: str) -> object:
    """How transformers compiles; on a CPU it has to be told to compile at all."""
    from transformers.generation.configuration_utils import CompileConfig

    if device != "cpu":
        return None
    config = CompileConfig(mode="default")
    config._compile_all_devices = True
    return config


def _row(case: Case, each: Sequence[float], firsts: Sequence[float], runs: str) -> Row:
    peak: int | str = ""
    allocated: int | str = ""
    if case.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(case.device)
        allocated = torch.cuda.memory_allocated(case.device)
    values = (
        round(1e3 * median(each), 4),
        round(case.batch / median(each), 1),
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


def profile(case: Case, model: nn.Module) -> None:
    """Prints where the time of the prompt and of a step goes on the GPU, by kernel."""
    steps = steps_of(model)
    ids = case.ids(int(model.config.vocab_size))  # type: ignore[union-attr, arg-type]

    def first() -> Tensor:
        return steps.start(ids, None, case.prompt + case.tokens).argmax(-1)

    chosen = first()
    _print_kernels("the prompt", first, 1)
    _print_kernels("a step", lambda: steps.greedy(chosen, PROFILED), PROFILED)


def _print_kernels(of: str, call: Callable[[], Tensor], steps: int) -> None:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    times, counts = Counter[str](), Counter[str]()
    for event in profile.events():
        times[event.name] += event.device_time / steps
        counts[event.name] += 1
    print(f"{of}: {sum(times.values()):.1f} us in {sum(counts.values()) / steps:.1f} launches")
    for name, us in times.most_common(15):
        print(f"{us:10.1f} us in {counts[name] / steps:7.1f} launches: {name[:90]}")


def main(words: Sequence[str] | None = None) -> int:
    """Measures, writes each row as it comes, and prints their path."""
    parser = parser_of("llm", __doc__)
    add_device(parser)
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b")
    parser.add_argument("--blocks", type=int, help="instead of all")
    known = (DENSE, *FORMATS)
    more = (*known, *WITHOUT_ZEROS, BLOCKS_OF_64, *DYNAMIC)
    parser.add_argument("--formats", nargs="+", choices=more, default=known)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--head", choices=(*known, *WITHOUT_ZEROS), default=DENSE)
    loops = (STEPS, GENERATE, CUSTOM)
    parser.add_argument("--loops", nargs="+", choices=loops, default=[STEPS])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, nargs="+", default=[1024])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    sizes = dict(MODELS[arguments.model])
    sizes["num_hidden_layers"] = arguments.blocks or sizes["num_hidden_layers"]
    blocks = int(sizes["num_hidden_layers"])
    length = max(arguments.prompt) + arguments.tokens
    path = None
    for format in arguments.formats:
        head = DENSE if format == DENSE else arguments.head
        dtype = DTYPES[arguments.dtype]
        model = llama(sizes, length, format, head, arguments.device, dtype)
        told = {"format": format, "head": head, "model": arguments.model, "dtype": arguments.dtype}
        told["blocks"] = str(blocks)
        for cell in product(arguments.loops, arguments.batch, arguments.prompt):
            case = Case(*cell, arguments.tokens, arguments.rounds, arguments.device)
            row = {**told, **asdict(case), **measured(case, model)}
            del row["device"]
            path = append(arguments.output, "llm", [row], arguments.device)
            shown = ("format", "head", "loop", "batch", "prompt", *MEASURED)
            print(", ".join(f"{name} {row[name]}" for name in shown), flush=True)
            if arguments.profile and case.loop == STEPS:
                profile(case, model)
        del model
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
