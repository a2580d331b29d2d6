"""An allocation improved by evolution: layers trade patterns, the whole model is the judge.

Sensitivities are measured one layer at a time, and several pruned layers together add more to the
loss than their sum. Here a whole choice of patterns is put into the model and its loss measured.
"""

import contextlib
import math
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from secateur.allocation.budget import Costs, figure
from secateur.allocation.choices import DENSE_CHOICE, parse_choice, patterns_by_grid, patterns_of
from secateur.core.progress import progress
from secateur.core.shown import Shown
from secateur.core.weights import require_ordinary
from secateur.core.wrappers import unwrapped
from secateur.model.blocks import Batch
from secateur.model.layers import weight_of
from secateur.model.outputs import eval_mode
from secateur.patterns import Grid, Pattern

# (batches, survivors) of each round of a generation: fewer and fewer, judged on more and more.
ROUNDS = ((1, 8), (4, 2), (16, 1))
MOST_SWITCHES = 3  # in one offspring, the smaller of two draws: most have one
# How often a switch goes one choice further, where a layer's are of several kinds: the next one in
# cost can lose far more than the one behind it.
FURTHER = 0.5

Weights = Mapping[str, Mapping[str, Tensor]]
Choices = dict[str, str]


@dataclass(frozen=True)
class Evolved(Shown):
    """The best choices found, what they cost, and the losses on the way.

    `losses` holds the loss of the start, then of each generation's best, each on the batches of its
    last round: they compare only where that round takes all batches.
    """

    choices: Mapping[str, str]
    cost: float
    unit: str
    losses: tuple[float, ...]

    @property
    def patterns(self) -> dict[str, Pattern]:
        """The patterns of the layers that get zeros, as `sc.plan` takes them."""
        return patterns_of(self.choices)

    @property
    def by_grid(self) -> dict[Grid | None, dict[str, Pattern]]:
        """The same for each grid, for as many passes; `unstructured:0` where one only rounds."""
        return patterns_by_grid(self.choices)

    @property
    def paragraphs(self) -> tuple[str]:
        return (
            f"loss {self.losses[-1]:.4f} after {len(self.losses) - 1} generations, "
            f"{self.losses[0]:.4f} at the start, {figure(self.cost)} {self.unit}",
        )


def evolve(
    model: nn.Module,
    start: Mapping[str, Pattern | str],
    weights: Weights,
    costs: Costs,
    loss: Callable[[nn.Module, Sequence[Batch]], float],
    batches: Sequence[Batch],
    *,
    generations: int = 100,
    offspring: int = 32,
    rounds: Sequence[tuple[int, int]] = ROUNDS,
    seed: int = 0,
) -> Evolved:
    """A choice of patterns with a lower `loss(model, batches)` that costs no more than `start`.

    `weights[choice]["layer.weight"]` are compressed weights, such as the `state_dict()` of copies
    of the model, each reconstructed to one pattern, on a grid where the choice (`2:4+int4`) names
    one; they may be on the CPU. In each generation the
    best choice so far gets `offspring`: a random layer takes its next costlier pattern, or one
    beyond it where they are of several kinds, and others take cheaper ones until the cost fits.
    Each of the `rounds`, (batches, survivors), judges the offspring on that many batches, drawn
    anew, and that many survive; the best so far joins the last. `start` maps layers to patterns as
    `Allocation.patterns` does, or to choices; layers not in it are dense.

    The model is left as it was. Reconstruct it again to the patterns found: the weights here were
    not made for one another.

    Cost: in each generation, summed over rounds, candidates x batches forward passes; a copy of all
        layers' dense weights on the CPU.
    Raises:
        ValueError: before anything is changed, if weights or costs are missing, a weight has
            another shape, or rounds ask for more batches than there are. The model is as it was.
    Source: after Sieberling et al. 2024 (EvoPress), arXiv:2410.14649, algorithm 1, whose switches
        are between layers of one size.
    """
    model = unwrapped(model)
    layers = {name: model.get_submodule(name) for name in costs.of}
    require_ordinary(layers)
    levels = {name: _levels(name, module, weights, costs) for name, module in layers.items()}
    best = {name: str(start.get(name, DENSE_CHOICE)) for name in layers}
    _require(start, best, levels, rounds, len(batches))
    generator, budget = random.Random(seed), costs.total(best)
    with eval_mode(model), torch.no_grad(), _stitching(layers, weights) as put:

        def judged(candidates: Sequence[Choices], count: int) -> list[tuple[float, Choices]]:
            some, losses = generator.sample(list(batches), count), list[float]()
            for one in candidates:
                put(one)
                value = float(loss(model, some))
                losses.append(value if math.isfinite(value) else math.inf)
            return sorted(zip(losses, candidates, strict=True), key=lambda pair: pair[0])

        losses = [judged([best], rounds[-1][0])[0][0]]
        for _ in progress(range(generations), "evolve", unit="generation"):
            candidates = [_child(best, levels, costs, budget, generator) for _ in range(offspring)]
            for count, survivors in rounds[:-1]:
                candidates = [one for _, one in judged(candidates, count)[:survivors]]
            value, best = judged([best, *candidates], rounds[-1][0])[0]
            losses.append(value)
    return Evolved(best, costs.total(best), costs.unit, tuple(losses))


def _child(
    parent: Choices,
    levels: Mapping[str, Sequence[str]],
    costs: Costs,
    budget: float,
    generator: random.Random,
) -> Choices:
    """The parent with some layers switched up and others down, within the budget.

    What the layers that went down leave unspent goes to others while it lasts. If no layer can go
    up, the child is the parent.
    """
    child = dict(parent)
    for _ in range(min(generator.randint(1, MOST_SWITCHES), generator.randint(1, MOST_SWITCHES))):
        names = generator.sample(list(child), len(child))
        up = next((name for name in names if child[name] != levels[name][-1]), None)
        if up is None:
            return child
        before = dict(child)
        child[up] = _next(child[up], levels[up], +1, generator)
        for name in names:
            if name != up and costs.total(child) > budget and child[name] != levels[name][0]:
                child[name] = _next(child[name], levels[name], -1, generator)
        if costs.total(child) > budget:  # the others have nothing to give
            child = before
        for name in names:
            if child[name] == before[name] != levels[name][-1]:
                more = child | {name: _next(child[name], levels[name], +1, generator)}
                if costs.total(more) > budget:
                    break
                child = more
    return child


def _next(choice: str, levels: Sequence[str], step: int, generator: random.Random) -> str:
    """A costlier choice, or with -1 a cheaper one: the next, or one behind it if kinds differ."""
    ahead = levels[levels.index(choice) + step :: step]
    if not _of_one_kind(tuple(levels)):
        while len(ahead) > 1 and generator.random() < FURTHER:
            ahead = ahead[1:]
    return ahead[0]


@cache
def _of_one_kind(levels: tuple[str, ...]) -> bool:
    """Whether these choices, but for dense, differ in sparsity alone."""
    return len({parse_choice(one).kind for one in levels if one != DENSE_CHOICE}) < 2


def _levels(name: str, module: nn.Module, weights: Weights, costs: Costs) -> list[str]:
    """The layer's choices, cheapest first: dense, and the patterns with weights and a cost."""
    found = [DENSE_CHOICE]
    for pattern, tensors in weights.items():
        tensor = tensors.get(f"{name}.weight")
        if tensor is None or pattern not in costs.of[name]:
            continue
        if tensor.shape != weight_of(module).shape:
            raise ValueError(
                f"evolve needs weights of {name} of shape {tuple(weight_of(module).shape)}, got "
                f"{tuple(tensor.shape)} for {pattern}: compress a copy of this model"
            )
        found.append(pattern)
    return sorted(found, key=lambda choice: costs.of[name][choice])


def _require(
    start: Mapping[str, Pattern | str],
    choices: Choices,
    levels: Mapping[str, Sequence[str]],
    rounds: Sequence[tuple[int, int]],
    batches: int,
) -> None:
    if unknown := [name for name in start if name not in levels]:
        raise ValueError(
            f"evolve needs the cost of every layer of the start, {unknown[0]} has none: make costs "
            "of the same layers"
        )
    for name, choice in choices.items():
        if choice not in levels[name]:
            raise ValueError(
                f"evolve needs weights and a cost for {name} in {choice}, it has both only for "
                f"{', '.join(levels[name])}: reconstruct a copy of the model to {choice}"
            )
    if not rounds or any(survivors < 1 or not 1 <= count <= batches for count, survivors in rounds):
        raise ValueError(
            f"evolve needs rounds of (batches, survivors), at least 1 and at most the {batches} "
            f"batches given, got {tuple(rounds)}: pass more batches, or rounds="
        )


@contextlib.contextmanager
def _stitching(
    layers: Mapping[str, nn.Module], weights: Weights
) -> Generator[Callable[[Choices], None]]:
    """Yield a function that puts chosen weights in place; at the end put the layers' own back."""
    own = {name: weight_of(module).detach().to("cpu", copy=True) for name, module in layers.items()}
    now = dict.fromkeys(layers, DENSE_CHOICE)

    def put(choices: Choices) -> None:
        for name, choice in choices.items():
            if choice != now[name]:
                tensor = own[name] if choice == DENSE_CHOICE else weights[choice][f"{name}.weight"]
                weight_of(layers[name]).copy_(tensor)
                now[name] = choice

    try:
        yield put
    finally:
        for name, module in layers.items():
            weight_of(module).copy_(own[name])
