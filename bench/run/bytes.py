"""Loss against bits a weight: sparse weights beside dense quantised ones, on one language model.

    python -m bench.run.bytes --model ../shared/models/reference-lm --rows 32 --validation 16

A recipe is a pattern, a grid or none, and how weights get there: `nearest` rounds each weight by
itself; SparseGPT prunes and rounds jointly, which without zeros is GPTQ; ALPS, `best` and
`thorough` are given the grid. Every linear layer of the blocks is treated; head, embeddings and
norms are as they were. All that is stored is rounded to bfloat16: scales, scale x code, and weights
without a grid. Training takes a batch a step, so that `--batch` counts for it.

Bits a weight are those of codes, positions and scales together, over all weights of the layers:

| part | bits |
|---|---|
| codes | the grid's, 16 without one, for each kept weight |
| positions of 2:4 | 2 for each kept weight, as `semi24` stores them |
| positions of n:m | ceil(log2(m choose n)) for each group of m: at 4:8 7 bits for 8 weights |
| positions of unstructured zeros | a bitmap: 1 for each weight |
| scales | 16 for each group of an output |

The folder holds a causal language model and `tokens.safetensors`, as for `bench.run.accuracy`.
Columns: nll and its difference to dense in nats a token on the validation rows, KL(dense || this)
and the share of tokens with the same top-1. Every recipe's row is written as soon as it is known,
and `--recipes` chooses some, so a run may be ended and taken up. The dense model's logits on all
validation rows stay in memory.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from bench.lib.command import add_device, parser_of
from bench.lib.rows import append
from secateur.integrations.tokens import end_of_text, stored_rows
from secateur.integrations.transformers import load_folder
from secateur.model import evaluate
from secateur.model.layers import weight_of
from secateur.model.statistics import call
from secateur.patterns import NM, Grid, Int2, Int3, Int4, Pattern, Unstructured
from secateur.reconstruct import Blockwise, Solution

STORED = torch.bfloat16  # weights without a grid, and scales
BITS_STORED = 16
EVERY_WEIGHT = Unstructured(0.0)  # keeps all
NEAREST, SPARSEGPT = "nearest", "sparsegpt"
ALPS, BEST, THOROUGH = "alps", "best", "thorough"


@dataclass(frozen=True)
class Recipe:
    """Which weights are kept, which numbers they may take, and how they get there."""

    pattern: Pattern
    grid: Grid | None
    method: str = SPARSEGPT

    @property
    def name(self) -> str:
        """`2:4 int4, sparsegpt`, for example; dense weights that are only stored have no method."""
        kept = "dense" if self.pattern == EVERY_WEIGHT else str(self.pattern)
        numbers = f"{kept} {self.grid.name if self.grid else 'bfloat16'}"
        if self.pattern == EVERY_WEIGHT and self.grid is None:
            return numbers
        gptq = self.pattern == EVERY_WEIGHT and self.method == SPARSEGPT
        return f"{numbers}, {'gptq' if gptq else self.method}"


DENSE = Recipe(EVERY_WEIGHT, None, NEAREST)
PATTERNS = NM(2, 4), NM(4, 8), Unstructured(0.5, "layer")
RECIPES = {
    recipe.name: recipe
    for recipe in (
        DENSE,
        *(
            Recipe(EVERY_WEIGHT, grid, how)
            for grid in (Int4(), Int3(), Int2())
            for how in (SPARSEGPT, NEAREST)
        ),
        *(Recipe(pattern, grid) for grid in (Int4(), None) for pattern in PATTERNS),
        *(Recipe(NM(2, 4), grid, ALPS) for grid in (Int4(), None)),
        *(
            Recipe(pattern, grid, how)
            for how in (BEST, THOROUGH)
            for pattern, grid in (
                (NM(2, 4), Int4()),
                (NM(2, 4), None),
                (EVERY_WEIGHT, Int4()),
                (EVERY_WEIGHT, Int3()),
            )
        ),
    )
}


def bits_a_weight(recipe: Recipe, shapes: Sequence[tuple[int, int]]) -> float:
    """Bits of codes, positions and scales for each weight, over layers of these (out, in)."""
    grid, weights = recipe.grid, sum(out * columns for out, columns in shapes)
    codes = (1 - recipe.pattern.sparsity) * (grid.bits if grid else BITS_STORED)
    scales = 0
    if grid is not None:
        groups = [math.ceil(c / grid.group_size) if grid.group_size else 1 for _, c in shapes]
        scales = sum(BITS_STORED * s[0] * n for s, n in zip(shapes, groups, strict=True))
    return codes + bits_of_positions(recipe.pattern) + scales / weights


def bits_of_positions(pattern: Pattern) -> float:
    """For each weight, kept or not.

    Raises: ValueError for a pattern whose positions nobody has counted.
    """
    match pattern:
        case Unstructured(sparsity):
            return 1.0 if sparsity else 0.0
        case NM(2, 4):
            return 2 * 2 / 4
        case NM(n, m):
            return math.ceil(math.log2(math.comb(m, n))) / m
    raise ValueError(f"bits of positions are counted for N:M and unstructured, got {pattern}")


def apply_(model: nn.Module, recipe: Recipe, data: Sequence[Tensor]) -> sc.Plan:
    """Give every planned layer the recipe's weights; the plan.

    Raises: ValueError where a layer of the blocks cannot have the pattern.
    """
    plan, every = (sc.plan(model, pattern) for pattern in (recipe.pattern, EVERY_WEIGHT))
    if missing := [name for name in every.layers if name not in plan.layers]:
        raise ValueError(
            f"{recipe.name} does not fit layer {missing[0]}, and its bits a weight are those of "
            "all layers: leave the recipe out of --recipes"
        )
    if recipe.method != NEAREST:
        sc.reconstruct_(model, plan, _algorithm(recipe), list(data))
    for name in plan.layers:
        weight = weight_of(model.get_submodule(name))
        with torch.no_grad():
            stored = weight.to(STORED)
            if recipe.grid is not None and recipe.method != SPARSEGPT:
                on_grid = stored if recipe.method == NEAREST else weight  # others found it already
                scales = recipe.grid.scales(on_grid)
                codes = recipe.grid.codes(on_grid, scales)
                stored = recipe.grid.dequantised(codes, scales.to(STORED)).to(STORED)
            weight.copy_(stored)
    sc.check(model, plan)
    return plan


def _algorithm(recipe: Recipe) -> Callable[..., Solution] | Blockwise:
    match recipe.method:
        case "sparsegpt":
            return _jointly(recipe.grid)
        case "alps":
            return partial(sc.alps, grid=recipe.grid)
        case "best":
            return replace(sc.best, grid=recipe.grid)
        case "thorough":
            return replace(sc.thorough, grid=recipe.grid)
    raise ValueError(f"{recipe.method} rounds and reconstructs nothing: it needs no algorithm")


def _jointly(grid: Grid | None) -> Callable[..., Solution]:
    """SparseGPT on this grid, with scales in the dtype that is stored, whatever the layer's is."""

    def sparsegpt(
        weight: Tensor, gram: Tensor, pattern: Pattern, memo: Callable[..., Any] = call
    ) -> Solution:
        return sc.sparsegpt(weight, gram, pattern, grid=grid, dtype=STORED, memo=memo)

    return sparsegpt


class Answers(nn.Module):
    """A causal model's logits on these batches of ids, computed once and looked up."""

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        super().__init__()
        with torch.no_grad():
            self.known = [(ids, model(ids).logits) for ids in batches]

    def forward(self, input_ids: Tensor) -> Tensor:
        """The logits of one of the batches, or of its first columns."""
        rows, length = input_ids.shape
        for ids, logits in self.known:
            if len(ids) == rows and torch.equal(ids[:, :length], input_ids):
                found: Tensor = logits[:, :length]
                return found
        raise ValueError("these ids are none of the batches that the model has answered")


def figures(model: nn.Module, dense: Answers, validation: Sequence[Tensor]) -> dict[str, float]:
    """nll, its difference to dense, KL and top-1, from one pass."""
    own = Answers(model, validation)
    agreement = evaluate.compare(own, dense, validation)
    nll, best = (evaluate.perplexity(one, validation).nll for one in (own, dense))
    return {"nll": nll, "dnll": nll - best, "kl": agreement.kl, "top1": agreement.top1}


def main(words: Sequence[str] | None = None) -> None:
    parser = parser_of("bytes", __doc__)
    add_device(parser)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--rows", type=int, default=64, help="calibration rows")
    parser.add_argument("--validation", type=int, default=64, help="validation rows")
    parser.add_argument("--seed", type=int, default=0, help="which calibration rows")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args(words)

    model = load_folder(options.model, torch.float32).to(options.device).eval()
    tokens, end = f"{options.model / 'tokens.safetensors'}:", end_of_text(options.model)

    def rows_of(key: str, rows: int, seed: int) -> tuple[list[Tensor], int]:
        """Batches on the device, and of how many documents they are."""
        dealt = stored_rows(tokens + key, rows, options.batch, end, seed)
        on_device = [ids.to(options.device) for ids in dealt.batches if isinstance(ids, Tensor)]
        return on_device, dealt.different

    calibration, documents = rows_of("calibration", options.rows, options.seed)
    validation, _ = rows_of("validation", options.validation, 0)
    dense = Answers(model, validation)
    shared = {
        "model": options.model.resolve().name,
        "calibration_rows": sum(map(len, calibration)),
        "seed": options.seed,
        "documents": documents,
        "validation_rows": sum(map(len, validation)),
        "batch": options.batch,
    }
    for name in options.recipes:
        recipe, copied = RECIPES[name], copy.deepcopy(model)
        begin = time.perf_counter()
        plan = apply_(copied, recipe, calibration)
        seconds = time.perf_counter() - begin
        sizes = [weight_of(copied.get_submodule(layer)).shape for layer in plan.layers]
        bits = bits_a_weight(recipe, [(out, columns) for out, columns in sizes])
        row = {"recipe": name, "bits": bits, **figures(copied, dense, validation)}
        append(options.output, "bytes", [{**shared, **row, "seconds": seconds}], options.device)
        told = f"{row['dnll']:.4f} over dense, KL {row['kl']:.4f}, top-1 {row['top1']:.1%}"
        print(f"{name}: {bits:.3f} bits a weight, {told}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
