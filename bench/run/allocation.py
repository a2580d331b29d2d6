"""What an allocation is worth on a real language model: the same SparseGPT, other sparsities.

    python -m bench.run.allocation ../shared/models/reference-lm --sparsities 0.6,0.7 --rows 128

The folder is as for `bench.run.accuracy`. Every linear layer of the blocks is pruned, all together
to the sparsity, and reconstructed by SparseGPT once the layers' sparsities are chosen: all alike
(uniform), by ERK, by OWL, by a budget on sensitivities, and by evolution. The last two need curves
and weights of all levels, made once (`shared_seconds`); `choice_seconds` is what the choice itself
took. Columns: nll and its difference to dense in nats a token on the validation rows, KL(dense ||
pruned), and R_S = 1 - dnll / dnll(uniform). Rows to search by are of documents that no calibration
row is of. R_KL, the same share of kl, is in the tables.
"""

import argparse
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from bench.lib.command import add_device, parser_of
from bench.lib.rows import append
from secateur.allocation import Evolved, Sensitivity, allocate, costs, erk, evolve, owl
from secateur.integrations.deal import apart
from secateur.integrations.tokens import end_of_text, stored_rows
from secateur.integrations.transformers import load_folder
from secateur.model import evaluate
from secateur.model.blocks import Batch
from secateur.model.outputs import eval_mode, logits_of
from secateur.patterns import Pattern, parse

Patterns = Mapping[str, Pattern]


class Divergence:
    """KL(dense || model) on batches, the dense log-probabilities kept: they are needed often."""

    def __init__(self, dense: nn.Module, batches: Sequence[Tensor]) -> None:
        self.batches = list(batches)
        with eval_mode(dense), torch.no_grad():
            self._dense = {id(batch): self._logp(dense, batch) for batch in self.batches}

    def __call__(self, model: nn.Module, batches: Sequence[Batch] | None = None) -> float:
        chosen = self.batches if batches is None else batches
        with torch.no_grad():
            return sum(self._one(model, batch) for batch in chosen) / len(chosen)

    def _one(self, model: nn.Module, batch: Batch) -> float:
        p, q = self._dense[id(batch)], self._logp(model, batch)
        return float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())

    @staticmethod
    def _logp(model: nn.Module, batch: Batch) -> Tensor:
        return F.log_softmax(logits_of(model(batch), "a batch").float(), dim=-1)


def compressed(
    dense: nn.Module, patterns: Sequence[str], calibration: Sequence[Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The weights of a copy of the model reconstructed to each pattern, by pattern and name."""
    found: dict[str, dict[str, Tensor]] = {}
    for pattern in patterns:
        model = copy.deepcopy(dense)
        plan = sc.plan(model, pattern)
        sc.reconstruct_(model, plan, sc.sparsegpt, list(calibration))
        found[pattern] = {
            f"{name}.weight": model.get_submodule(name).weight.detach() for name in plan.layers
        }
    return found


def choices(
    dense: nn.Module,
    pattern: str,
    calibration: Sequence[Tensor],
    curves: Sensitivity,
    weights: Mapping[str, Mapping[str, Tensor]],
    search: Divergence,
    generations: int,
    offspring: int,
) -> Iterator[tuple[str, Patterns, float]]:
    """Each method's patterns and the seconds that it took to choose them."""
    table = costs.parameters(curves)
    uniform = {name: parse(pattern) for name in curves.increase}
    budget = table.total(dict.fromkeys(curves.increase, pattern))
    begin = time.perf_counter()

    def seconds() -> float:
        nonlocal begin
        taken, begin = time.perf_counter() - begin, time.perf_counter()
        return taken

    yield "uniform", uniform, 0.0
    seconds()
    yield "erk", erk(dense, pattern, layers=list(uniform)), seconds()
    seconds()
    yield "owl", owl(dense, pattern, list(calibration), layers=list(uniform)), seconds()
    seconds()
    found = allocate(curves, table, budget).patterns
    yield "budget", found, seconds()
    rounds = ((1, 8), (2, 2), (len(search.batches), 1))

    def evolved(start: Patterns, generations: int) -> Evolved:
        return evolve(
            dense,
            start,
            weights,
            table,
            search,
            search.batches,
            generations=generations,
            offspring=offspring,
            rounds=rounds,
        )

    # Where single layers mislead, which they do at high sparsity, uniform is the better start.
    start = min((uniform, found), key=lambda one: evolved(one, 0).losses[0])
    best = evolved(start, generations)
    print(best, flush=True)
    yield "evolved", best.patterns, seconds()


def measure(
    dense: nn.Module, chosen: Patterns, calibration: Sequence[Tensor], validation: Sequence[Tensor]
) -> dict[str, str | float]:
    """What the patterns cost the model once it is reconstructed to them."""
    model, plan = copy.deepcopy(dense), sc.plan(dense, chosen)
    begin = time.perf_counter()
    sc.reconstruct_(model, plan, sc.sparsegpt, list(calibration))
    seconds = time.perf_counter() - begin
    sc.check(model, plan)
    # Layers that are left dense have no zeros and count all the same.
    weights = [model.get_submodule(name).weight for name in sc.plan(dense, "unstructured:0").layers]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return {
        "zeros": zeros / sum(weight.numel() for weight in weights),
        "nll": evaluate.perplexity(model, validation).nll,
        "kl": evaluate.compare(model, dense, validation).kl,
        "reconstruct_seconds": seconds,
    }


def options_of(words: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("allocation", __doc__)
    add_device(parser)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sparsities", default="0.6,0.7")
    parser.add_argument("--levels", default="0.3,0.4,0.45,0.5,0.55,0.6,0.65,0.7,0.75,0.8,0.85,0.9")
    parser.add_argument("--rows", type=int, default=128, help="calibration rows")
    parser.add_argument("--search-rows", type=int, default=32, help="more of them, to search by")
    parser.add_argument("--sense-batches", type=int, default=2, help="of these, for the curves")
    parser.add_argument("--validation-rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row to search by")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--search-batch", type=int, default=4)
    parser.add_argument("--generations", type=int, default=100)
    parser.add_argument("--offspring", type=int, default=32)
    return parser.parse_args(words)


@dataclass(frozen=True)
class Data:
    """Batches to reconstruct layers on, to search by, and to judge by."""

    calibration: Sequence[Tensor]
    search: Sequence[Tensor]
    validation: Sequence[Tensor]

    @classmethod
    def read(cls, options: argparse.Namespace) -> "Data":
        """Rows of the model's folder, on the device; those to search by are of other documents."""
        found, documents = _rows("calibration", options.rows + options.search_rows, options)
        searched, calibrated = apart(documents, options.search_rows)
        return cls(
            found[calibrated].split(options.batch),
            found[searched, : options.length].split(options.search_batch),
            _rows("validation", options.validation_rows, options)[0].split(options.batch),
        )


def _rows(which: str, count: int, options: argparse.Namespace) -> tuple[Tensor, tuple[int, ...]]:
    """Rows on the device, and the document of each."""
    tokens = f"{options.model / 'tokens.safetensors'}:{which}"
    dealt = stored_rows(tokens, count, count, end_of_text(options.model))
    (ids,) = dealt.batches
    assert isinstance(ids, Tensor), "rows of ids have no mask"
    return ids.to(options.device), dealt.documents


def row_of(
    dense: nn.Module, chosen: Patterns, data: Data, dense_nll: float, uniform_loss: float
) -> dict[str, str | float]:
    """What the patterns cost, beside what the same sparsity for all costs; 0 if this is that."""
    row = measure(dense, chosen, data.calibration, data.validation)
    dnll = float(row["nll"]) - dense_nll
    return row | {"dnll": dnll, "r_s": 1 - dnll / (uniform_loss or dnll)}


def main(words: Sequence[str] | None = None) -> None:
    options = options_of(words)
    dense = load_folder(options.model, torch.float32).to(options.device)
    data = Data.read(options)
    search = Divergence(dense, data.search)
    dense_nll = evaluate.perplexity(dense, data.validation).nll
    sparsities = options.sparsities.split(",")
    levels = sorted({*options.levels.split(","), *sparsities}, key=float)
    patterns = [f"unstructured:{level}@layer" for level in levels]
    begin = time.perf_counter()
    curves = sc.sensitivity(
        dense,
        patterns,
        lambda model: search(model, search.batches[: options.sense_batches]),
        criterion=sc.wanda,
        batches=list(data.calibration),
    )
    weights = compressed(dense, list(curves.patterns), data.calibration)
    shared_seconds = time.perf_counter() - begin
    print(f"curves and weights of {len(levels)} levels: {shared_seconds:.0f} s", flush=True)
    shared = {
        "model": options.model.name,
        "dense_nll": dense_nll,
        "calibration_rows": sum(map(len, data.calibration)),
        "search_rows": sum(map(len, data.search)),
        "validation_rows": options.validation_rows,
        "shared_seconds": shared_seconds,
    }
    steps = options.generations, options.offspring
    for sparsity in sparsities:
        pattern = str(parse(f"unstructured:{sparsity}@layer"))
        uniform_loss = 0.0
        for method, chosen, seconds in choices(
            dense, pattern, data.calibration, curves, weights, search, *steps
        ):
            row = row_of(dense, chosen, data, dense_nll, uniform_loss)
            uniform_loss = uniform_loss or float(row["dnll"])
            print(f"{pattern} {method}: nll {row['nll']:.4f}, R_S {row['r_s']:.3f}", flush=True)
            row |= {"pattern": pattern, "method": method, "choice_seconds": seconds}
            append(options.output, "allocation", [{**shared, **row}], options.device)


if __name__ == "__main__":
    main()
