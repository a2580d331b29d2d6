"""Whether experts are faster packed: measured as the whole that runs them, with random routing.

A matrix that is faster alone is not enough: packed experts run one after another, where
transformers runs all of a stack in one operator.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.accelerate.candidates import DENSE, first_line
from secateur.accelerate.choices import LEAST_GAIN, NO_LOSS
from secateur.accelerate.layer_report import token_count
from secateur.accelerate.tokens import Day
from secateur.core.stacks import functions, stacks_of
from secateur.formats.experts import SparseExperts
from secateur.formats.kernels.timing import Calls, Timing, copies_for
from secateur.formats.linear import SparseLinear

PACKED, GROUPED = "packed", "grouped_mm"  # the latter is what transformers takes by default
EXPERTS_PER_TOKEN = 2  # where no config says it; Mixtral's
ON_A_GPU = (
    "no kernel runs a stack of experts on a GPU, where one after another they would wait for the "
    "host: to pack them saves memory alone"
)

Timer = Callable[[Mapping[str, Calls], torch.device], Mapping[str, Timing]]


@dataclass(frozen=True)
class Judged:
    """Whether experts gain, packed, and what was measured, in words."""

    gain: bool
    told: str


def judge_(
    opened: Mapping[str, nn.Module], packed: dict[str, SparseLinear], day: Day, timer: Timer
) -> dict[str, Judged]:
    """What was found of each packed matrix of an expert; those that do not gain leave `packed`.

    `opened` are the modules with their stacks, by name.
    """
    found: dict[str, Judged] = {}
    known: dict[Any, Judged] = {}
    for name, dense in opened.items():
        inside = {n.removeprefix(f"{name}."): p for n, p in packed.items() if _is_in(n, name)}
        if not inside:
            continue
        like = _likeness(dense, inside)
        if like not in known:
            known[like] = _judged(dense, SparseExperts(dense).with_layers(inside), day, timer)
        found |= {f"{name}.{inner}": known[like] for inner in inside}
    for name, judged in found.items():
        if not judged.gain:
            del packed[name]
    return found


def often_chosen(opened: Mapping[str, nn.Module], layer: str, day: Day) -> tuple[float, ...]:
    """How many of a stack's experts the day's calls run, as a share; empty for another layer."""
    for name, dense in opened.items():
        if _is_in(layer, name):
            experts = len(next(iter(stacks_of(dense).values())))
            missed = 1 - _experts_per_token(dense, experts) / experts
            return tuple(1 - missed**tokens for tokens in day.tokens)
    return ()


def _is_in(layer: str, module: str) -> bool:
    return layer.startswith(f"{module}.")


def _experts_per_token(dense: Any, experts: int) -> int:
    return min(experts, getattr(dense.config, "num_experts_per_tok", None) or EXPERTS_PER_TOKEN)


def _likeness(dense: nn.Module, inside: Mapping[str, SparseLinear]) -> Any:
    """What is equal for experts of which one measurement stands for the others."""
    shapes = tuple((n, p.shape, p.dtype, p.device) for n, p in stacks_of(dense).items())
    runs = tuple((n, layer.format, layer.dispatch) for n, layer in inside.items())
    return type(dense), shapes, runs


@torch.no_grad()
def _judged(dense: nn.Module, packed: SparseExperts, day: Day, timer: Timer) -> Judged:
    """Whether the experts gain at a number of tokens and lose at none."""
    ratios: list[tuple[float, str]] = []
    for tokens in day.tokens:
        try:
            timings = timer(_calls(dense, packed, tokens), next(dense.parameters()).device)
        except (RuntimeError, ValueError, MemoryError) as problem:
            return Judged(False, f"its experts could not be measured: {first_line(problem)}")
        times = {name: timing.median_us for name, timing in timings.items()}
        now, before = times.pop(PACKED), min(times.values())
        words = f"{now:.1f} us packed and {before:.1f} dense at {token_count(tokens)}"
        ratios.append((before / now, words))
    found = [ratio for ratio, _ in ratios]
    gain = max(found) >= LEAST_GAIN and min(found) >= NO_LOSS
    told = ", ".join(words for _, words in ratios)
    return Judged(gain, f"its experts, run one after another, take {told}")


def _calls(dense: nn.Module, packed: SparseExperts, tokens: int) -> dict[str, Calls]:
    """Calls of the experts in each way, each call with weights and a routing of its own."""
    stacks = [*stacks_of(dense).values()]
    held = sum(p.nbytes for p in (*packed.parameters(), *packed.buffers()))
    count = copies_for(sum(p.nbytes for p in stacks) + held)
    inputs = [_routing(dense, stacks[0], tokens, draw) for draw in range(count)]
    found: dict[str, Calls] = {}
    both = [(dense, packed), *((deepcopy(dense), deepcopy(packed)) for _ in range(count - 1))]
    found[DENSE] = [partial(one, *given) for (one, _), given in zip(both, inputs, strict=True)]
    if (grouped := functions().get(GROUPED)) is not None:
        pairs = zip(both, inputs, strict=True)
        found[GROUPED] = [partial(grouped, one, *given) for (one, _), given in pairs]
    found[PACKED] = [partial(one, *given) for (_, one), given in zip(both, inputs, strict=True)]
    return found


def _routing(dense: Any, stacked: Tensor, tokens: int, seed: int) -> Sequence[Tensor]:
    """Tokens, the experts of each, drawn with equal chances, and their shares."""
    experts, out, width = stacked.shape
    width = out if dense.is_transposed else width
    k = _experts_per_token(dense, experts)
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.rand, generator=generator, dtype=torch.float32, device="cpu")
    x = draw(tokens, width).sub_(0.5).to(stacked)
    chosen = draw(tokens, experts).topk(k).indices.to(stacked.device)
    return x, chosen, torch.full_like(chosen, 1 / k, dtype=stacked.dtype)
