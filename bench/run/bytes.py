"""Loss against bits a weight: sparse weights beside dense quantised ones, on one language model.

    python -m bench.run.bytes --model ../shared/models/reference-lm --rows 32 --validation 16

With `--recipes "2:4 int4, thorough, 2048 written rows"` the dense model writes rows first, and with
`--others prose=docs` losses on the texts in a folder are columns too.

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
| positions of blocks | the column of each kept block: 32 |
| scales | 16 for each group of an output |

The folder holds a causal language model and `tokens.safetensors`, as for `bench.run.accuracy`.
Written rows stand beside those of the file: the dense model, in the dtype in which it is stored,
goes on with a few tokens of them (`sampled_rows`). They are kept in the folder of the rows.
Columns: nll and its difference to dense in nats a token on the validation rows, KL(dense || this)
and the share of tokens with the same top-1; the same difference and KL on rows of each of the
`--others`, texts of another kind; the recipe's seconds, and the most memory that a GPU had
allocated meanwhile.

`--recipes` chooses some, in this order. A recipe's row is written as soon as it is known, and left
out if it is there already, of this commit and these options: a run may be ended, and the same
command takes it up. The dense model's logits on all validation rows stay in memory.
"""

import argparse
import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur as sc
from bench.lib.command import add_device, parser_of
from bench.lib.results import read
from bench.lib.rows import append, path_of
from secateur.integrations.deal import Dealt
from secateur.integrations.tokens import end_of_text, sampled_rows, stored_rows, text_rows
from secateur.integrations.transformers import load_folder
from secateur.model import evaluate
from secateur.model.layers import weight_of
from secateur.model.statistics import call
from secateur.patterns import NM, Block, Grid, Int2, Int3, Int4, Pattern, Unstructured
from secateur.reconstruct import Blockwise, Solution

STORED = torch.bfloat16  # weights without a grid, and scales
BITS_STORED = 16
EVERY_WEIGHT = Unstructured(0.0)  # keeps all
NEAREST, SPARSEGPT = "nearest", "sparsegpt"
ALPS, BEST, THOROUGH = "alps", "best", "thorough"
# Where there are many rows: half-blocks trained on each of them once, then the whole model as ever.
THOROUGH_ONCE = "thorough, half-blocks once"
WRITTEN = 512, 2048, 4096, 8192  # rows
AT_ONCE = 4096  # rows that are written together
OTHERS = 64  # rows of each text of another kind


@dataclass(frozen=True)
class Recipe:
    """Which weights are kept, which numbers they may take, and how they get there."""

    pattern: Pattern
    grid: Grid | None
    method: str = SPARSEGPT
    written: int = 0  # rows that the dense model writes, beside the calibration rows

    @property
    def name(self) -> str:
        """`2:4 int4, sparsegpt`, for example; dense weights that are only stored have no method."""
        data = f", {self.written} written rows" if self.written else ""
        return f"{self._without_data}{data}"

    @property
    def _without_data(self) -> str:
        kept = "dense" if self.pattern == EVERY_WEIGHT else str(self.pattern)
        numbers = f"{kept} {self.grid.name if self.grid else 'bfloat16'}"
        if self.pattern == EVERY_WEIGHT and self.grid is None:
            return numbers
        gptq = self.pattern == EVERY_WEIGHT and self.method == SPARSEGPT
        return f"{numbers}, {'gptq' if gptq else self.method}"


DENSE = Recipe(EVERY_WEIGHT, None, NEAREST)
PATTERNS = NM(2, 4), NM(4, 8), Unstructured(0.5, "layer")
TRAINED = [
    Recipe(pattern, grid, how)
    for how in (BEST, THOROUGH, THOROUGH_ONCE)
    for pattern, grid in (
        *((pattern, grid) for pattern in PATTERNS for grid in (Int4(), None)),
        *((EVERY_WEIGHT, grid) for grid in (Int4(), Int3(), Int2())),
    )
]
BLOCKS = Block(64, 64, 0.5), Block(64, 64, 0.8)
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
        *(Recipe(pattern, None) for pattern in BLOCKS),
        *(Recipe(NM(2, 4), grid, ALPS) for grid in (Int4(), None)),
        *TRAINED,
        *(replace(recipe, written=rows) for rows in WRITTEN for recipe in TRAINED),
    )
}

UNWRITTEN = [name for name, recipe in RECIPES.items() if not recipe.written]


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
        case Block(rows, cols, sparsity):
            return 32 * (1 - sparsity) / (rows * cols)
    raise ValueError(f"bits of positions are of N:M, blocks and unstructured, got {pattern}")


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
        case "thorough, half-blocks once":
            return replace(sc.thorough, grid=recipe.grid, epochs=1)
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
        for ids, logits in self.known:  # on whatever device: a module without parameters has none
            if len(ids) == rows and torch.equal(ids[:, :length], input_ids.to(ids.device)):
                found: Tensor = logits[:, :length]
                return found
        raise ValueError("these ids are none of the batches that the model has answered")


@dataclass(frozen=True)
class Rows:
    """Rows of ids by what they are for, with the dense model's answers where it is judged."""

    calibration: list[Tensor]
    documents: int  # of the calibration rows
    validation: list[Tensor]
    dense: Answers
    others: Mapping[str, tuple[list[Tensor], Answers]]
    write: Callable[[], list[Tensor]]  # the most rows that any recipe needs

    def data(self, recipe: Recipe) -> list[Tensor]:
        """The recipe's calibration rows, with those that are written for it."""
        if not recipe.written:
            return self.calibration
        written = torch.cat(self.write())[: recipe.written]
        return [*self.calibration, *written.split(len(self.calibration[0]))]

    def figures(self, model: nn.Module) -> dict[str, float]:
        """What a model loses on the validation rows, and on the others."""
        found = figures(model, self.dense, self.validation)
        for name, (batches, dense) in self.others.items():
            one = figures(model, dense, batches)
            found |= {f"dnll_{name}": one["dnll"], f"kl_{name}": one["kl"]}
        return found


def figures(model: nn.Module, dense: Answers, validation: Sequence[Tensor]) -> dict[str, float]:
    """nll, its difference to dense, KL and top-1, from one pass."""
    own = Answers(model, validation)
    agreement = evaluate.compare(own, dense, validation)
    nll, best = (evaluate.perplexity(one, validation).nll for one in (own, dense))
    return {"nll": nll, "dnll": nll - best, "kl": agreement.kl, "top1": agreement.top1}


def rows_of(options: argparse.Namespace, model: nn.Module) -> Rows:
    """The rows that the options name, on the device."""
    tokens, end = f"{options.model / 'tokens.safetensors'}:", end_of_text(options.model)

    def placed(dealt: Dealt) -> list[Tensor]:
        return [ids.to(options.device) for ids in dealt.batches if isinstance(ids, Tensor)]

    dealt = stored_rows(f"{tokens}calibration", options.rows, options.batch, end, options.seed)
    judged = stored_rows(f"{tokens}validation", options.validation, options.batch, end)
    calibration, validation = placed(dealt), placed(judged)
    others = {}
    for name, path in options.others:
        text = text_rows(options.model, path, OTHERS, validation[0].shape[1], options.batch)
        batches = placed(text)
        others[name] = batches, Answers(model, batches)
    most = max(RECIPES[name].written for name in options.recipes)

    @functools.cache
    def write() -> list[Tensor]:
        case = options.model.resolve().name, options.rows, options.seed, options.batch, most
        path = options.output / f"written_{'_'.join(map(str, case))}.safetensors"
        if not path.exists():
            writer = load_folder(options.model).to(options.device)
            ids = sampled_rows(writer, calibration, most, at_once=AT_ONCE, seed=options.seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"written": torch.cat(ids).int()}, path)
        return [load_file(path)["written"].long().to(options.device)]

    answers = Answers(model, validation)
    return Rows(calibration, dealt.different, validation, answers, others, write)


def main(words: Sequence[str] | None = None) -> None:
    options = options_of(words)
    model = load_folder(options.model, torch.float32).to(options.device).eval()
    rows = rows_of(options, model)
    shared = {
        "model": options.model.resolve().name,
        "calibration_rows": sum(map(len, rows.calibration)),
        "seed": options.seed,
        "documents": rows.documents,
        "validation_rows": sum(map(len, rows.validation)),
        "batch": options.batch,
    }
    for name in options.recipes:
        recipe, copied = RECIPES[name], copy.deepcopy(model)
        if is_there(options, {**shared, "recipe": name}):
            print(f"{name}: its row is there", flush=True)
            continue
        data = rows.data(recipe)
        with timed(options.device) as taken:
            plan = apply_(copied, recipe, data)
        sizes = [weight_of(copied.get_submodule(layer)).shape for layer in plan.layers]
        bits = bits_a_weight(recipe, [(out, columns) for out, columns in sizes])
        row = {"recipe": name, "written": recipe.written, "bits": bits, **rows.figures(copied)}
        append(options.output, "bytes", [{**shared, **row, **taken}], options.device)
        told = f"{row['dnll']:.4f} over dense, KL {row['kl']:.4f}, top-1 {row['top1']:.1%}"
        print(f"{name}: {bits:.3f} bits a weight, {told}, {taken['seconds']:.0f} s", flush=True)


def options_of(words: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("bytes", __doc__)
    add_device(parser)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=UNWRITTEN)
    parser.add_argument("--rows", type=int, default=64, help="calibration rows")
    parser.add_argument("--validation", type=int, default=64, help="validation rows")
    parser.add_argument("--others", nargs="+", type=_named, default=[], metavar="NAME=PATH")
    parser.add_argument("--seed", type=int, default=0, help="which calibration rows")
    parser.add_argument("--batch", type=int, default=8)
    return parser.parse_args(words)


def _named(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    return name, path


def is_there(options: argparse.Namespace, case: Mapping[str, str | int]) -> bool:
    """Whether this commit's file has a row of the case already."""
    path = path_of(options.output, "bytes", options.device)
    wanted = {name: str(value) for name, value in case.items()}
    return path.exists() and any(wanted.items() <= row.items() for row in read(path))


@contextlib.contextmanager
def timed(device: str) -> Iterator[dict[str, float | str]]:
    """What the block takes, once it has ended: seconds, and GB at most on a GPU."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    taken: dict[str, float | str] = {}
    begin = time.perf_counter()
    yield taken
    if on_gpu:
        torch.cuda.synchronize(device)
    taken["seconds"] = time.perf_counter() - begin
    taken["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else ""


if __name__ == "__main__":
    main()
