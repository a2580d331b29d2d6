"""Searches over cuSPARSELt's algorithms, each in a child of its own: which of them crash here?

On 2026-11-29 one executed an illegal instruction, in fp16 at 256 x 512, and took the CUDA context
of its process with it. This repeats those searches with what the library remembers left aside, so
that every algorithm is tried every time; a row is one search, with what ended a child and how, and
the attempts that took longest. The seconds of each attempt are printed as it ends.

    python -m bench.run.searches --searches 20
"""

import json
import tempfile
from collections.abc import Sequence
from itertools import cycle, islice, product
from pathlib import Path
from time import monotonic

import torch

from bench.lib.command import parser_of
from bench.lib.rows import Row, append
from secateur.formats.kernels import cusparselt_child
from secateur.formats.kernels.cusparselt import STEPS, SearchCase, Setting
from secateur.formats.kernels.cusparselt_child import NoSearch, Search, end_child, searched
from secateur.formats.kernels.cusparselt_search import Past

TOKENS = (16, 32, 128, 256, 1024, 4096)  # the most of the buckets of 1, 17, 100, 256, 1000, 4096


def one(case: SearchCase, device: torch.device) -> Row:
    """A row of one search: what it found, and what crashed."""
    crashed: dict[Setting, str] = {}
    attempts = list[tuple[float, str]]()

    def tried(settings: str, seconds: float) -> None:
        attempts.append((seconds, settings))
        print(f"{monotonic() - started:.1f} s: {seconds:.3f} s for {settings}", flush=True)

    def ended(setting: Setting, how: str) -> None:
        crashed[setting] = how
        print(f"{monotonic() - started:.1f} s: {setting} ended a child: {how}", flush=True)

    past, started = Past(), monotonic()
    row: dict[str, str | int | float] = dict.fromkeys(
        ("algorithm", "split_k", "split_k_mode", "us", "whole", "note"), ""
    )
    with tempfile.TemporaryDirectory() as journals:
        version = torch.backends.cusparselt.version()
        search = Search(case, device, version, case.dtypes, Path(journals))
        try:
            found = searched(search, past, ended, tried)
        except (NoSearch, RuntimeError) as problem:
            row["note"] = str(problem)
        else:
            setting = found.setting
            row |= {"algorithm": setting.algorithm, "split_k": setting.split_k}
            row |= {"split_k_mode": setting.split_k_mode, "us": round(found.us, 3)}
            row["whole"] = found.whole
        finally:
            end_child()
    wrong = {setting: why for setting, why in past.dropped.items() if why.startswith("wrong by")}
    return {
        **{"cusparselt": version or "", "dtype": case.dtypes, "out": case.out_features},
        **{"in": case.in_features, "tokens": case.tokens, "bias": case.bias is not None},
        **row,
        "right": len(past.us),
        "wrong": "; ".join(map(str, wrong)),
        "refused": len(past.refused),
        "attempts": len(attempts),
        "slowest": "; ".join(f"{text}: {s:.3f} s" for s, text in sorted(attempts)[:-4:-1]),
        "crashed": "; ".join(f"{setting}: {how}" for setting, how in crashed.items()),
        "seconds": round(monotonic() - started, 1),
    }


def main(words: Sequence[str] | None = None) -> int:
    """Searches, prints each row as JSON, appends it to a file, and prints its path."""
    parser = parser_of("searches", __doc__)
    parser.add_argument("--searches", type=int, default=20)
    parser.add_argument("--skip", type=int, default=0, help="so that processes can share them")
    parser.add_argument("--shape", type=int, nargs=2, default=(256, 512), metavar=("OUT", "IN"))
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--time-budget", type=float, default=480.0, metavar="SECONDS")
    arguments = parser.parse_args(words)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    if any(tokens < STEPS[dtype] or tokens & (tokens - 1) for tokens in arguments.tokens):
        parser.error(f"tokens need to be powers of two from {STEPS[dtype]}")
    kinds = cycle(product(arguments.tokens, (None, dtype)))
    end, path = monotonic() + arguments.time_budget, None
    cusparselt_child.SEARCH_SECONDS = arguments.time_budget  # all settings are to be tried
    chosen = islice(kinds, arguments.skip, arguments.skip + arguments.searches)
    for number, (tokens, bias) in enumerate(chosen):
        if monotonic() > end:
            print(f"out of time after {number} searches")
            break
        case = SearchCase(dtype, dtype, *arguments.shape, tokens, bias, alpha=False)
        row = one(case, device)
        path = append(arguments.output, "searches", [row], arguments.device)
        print(json.dumps(row), flush=True)
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
