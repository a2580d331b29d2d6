"""What pruning costs a real language model: every method on the same calibration rows, one run.

    python -m bench.accuracy ../shared/models/reference-lm --patterns 2:4 --rows 32,512

`--methods` chooses some, several `--rows` are cases of their own, and another `--seed` is another
choice of rows. Other libraries' methods are in `bench.peers_accuracy`: one that is not installed,
or has no such pattern, has its reason in `note`, and so has one whose zeros do not fit the pattern.

The folder holds a causal language model and `tokens.safetensors` with rows of ids `calibration` and
`validation`, cut from documents laid end to end; rows are taken of as many documents as there are.
Every linear layer of the blocks is pruned; head, embeddings and norms stay dense. Columns: the
documents that calibration rows are of; nll and its difference to dense in nats a token on the
validation rows, KL(dense || pruned), top-1 agreement with dense, R_M and R_S = 1 - dnll /
dnll(magnitude | SparseGPT of the paper), where that method is among the chosen. R_KL, the same
share of kl, is in the tables.
"""

import argparse
import copy
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import secateur as sc
from bench.accuracy_tables import PAPER
from bench.cold import reason
from bench.paper import sparsegpt_algorithm_1
from bench.peers_accuracy import PEERS
from bench.rows import append
from secateur.integrations.tokens import end_of_text, sampled_rows, stored_rows
from secateur.integrations.transformers import load_folder
from secateur.model import evaluate
from secateur.model.blocks import Batch
from secateur.patterns import NM, Pattern, Unstructured
from secateur.prune.decompose import decompose_
from secateur.reconstruct import CompensationReport, Solution, compensate

EXTRA = 0.05  # of the model's parameters, in an adapter


def paper(weight: Tensor, gram: Tensor, pattern: Pattern) -> Solution:
    """The transcription of the paper's algorithm, as an algorithm for `reconstruct_`."""
    match pattern:
        case NM(n, m):
            pruned, mask = sparsegpt_algorithm_1(weight, gram, n=n, m=m)
        case Unstructured(sparsity):
            pruned, mask = sparsegpt_algorithm_1(weight, gram, p=sparsity)
        case _:
            raise ValueError(f"the paper's algorithm has no {pattern}")
    return Solution(pruned.to(weight.dtype), mask)


def compensated(model: nn.Module, plan: sc.Plan, data: list[Batch]) -> CompensationReport:
    """`sc.best`, and an adapter beside it with at most 5 % of the model's parameters."""
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sc.reconstruct_(model, plan, sc.best, data)
    with TemporaryDirectory() as folder:
        report = compensate(model, dense, data, Path(folder) / "adapter", extra=EXTRA)
        attach_(model, plan, Path(folder) / "adapter")
    return report


def decomposed(model: nn.Module, plan: sc.Plan, data: list[Batch]) -> CompensationReport:
    """`sc.best` on what a low-rank part leaves of each weight, with as many parameters."""
    with TemporaryDirectory() as folder:
        report = decompose_(model, plan, sc.best, data, Path(folder) / "adapter", extra=EXTRA)
        attach_(model, plan, Path(folder) / "adapter")
    return report


def sampled(method: str, rows: int, model: nn.Module, plan: sc.Plan, data: list[Batch]) -> object:
    """The method on the data and on rows that the dense model wrote beside it."""
    ids = [batch for batch in data if isinstance(batch, Tensor)]
    written = sampled_rows(model, ids, rows, at_once=512)
    return METHODS[method](model, plan, [*data, *written])


def attach_(model: nn.Module, plan: sc.Plan, adapter: Path) -> None:
    """Add the adapter's factors by hooks, as a runtime would."""
    factors = load_file(adapter / "adapter_model.safetensors")
    for name in plan.layers:
        A, B = (factors[f"base_model.model.{name}.lora_{one}.weight"] for one in "AB")
        module = model.get_submodule(name)
        A, B = (factor.to(next(module.parameters()).device) for factor in (A, B))
        module.register_forward_hook(
            lambda module, args, output, A=A, B=B: output + args[0] @ A.T @ B.T
        )


METHODS: dict[str, Callable[[nn.Module, sc.Plan, list[Batch]], object]] = {
    "magnitude": lambda model, plan, data: sc.prune_(model, plan),
    "wanda": lambda model, plan, data: sc.prune_(model, plan, sc.wanda, data),
    PAPER: lambda model, plan, data: sc.reconstruct_(model, plan, paper, data),
    "sparsegpt": lambda model, plan, data: sc.reconstruct_(model, plan, sc.sparsegpt, data),
    "refit(wanda)": lambda model, plan, data: sc.reconstruct_(
        model, plan, sc.refit(sc.wanda), data
    ),
    "refit(sparsegpt)": lambda model, plan, data: sc.reconstruct_(
        model, plan, sc.refit(sc.sparsegpt), data
    ),
    "alps": lambda model, plan, data: sc.reconstruct_(model, plan, sc.alps, data),
    "alps, damping 0.01": lambda model, plan, data: sc.reconstruct_(
        model, plan, functools.partial(sc.alps, damping=0.01), data
    ),
    "blockwise(alps)": lambda model, plan, data: sc.reconstruct_(
        model, plan, sc.blockwise(sc.alps), data
    ),
    "thorough": lambda model, plan, data: sc.reconstruct_(model, plan, sc.thorough, data),
    "best, 5% extra": compensated,
    "decompose(best), 5% extra": decomposed,
    **{name: peer.prune for name, peer in PEERS.items()},
}
ANY_MODEL = tuple(METHODS)
METHODS |= {
    f"{method}, {rows} sampled rows": functools.partial(sampled, method, rows)
    for method in ("sparsegpt", "blockwise(alps)", "thorough")
    for rows in (512, 2048)
}


def row_of(
    name: str,
    dense: nn.Module,
    plan: sc.Plan,
    data: Sequence[Batch],
    figures: Callable[[nn.Module], dict[str, float]],
) -> dict[str, str | float]:
    """The method's row: the figures of its model, and in `note` what a peer did wrong, if anything.

    A peer that fails has no figures. What a method of ours raises is raised, also where its zeros
    break the plan.
    """
    model, peer = copy.deepcopy(dense), PEERS.get(name)
    row: dict[str, str | float] = {"method": name, "note": ""}
    begin = time.perf_counter()
    try:
        print(METHODS[name](model, plan, list(data)))
        row["seconds"] = time.perf_counter() - begin
        sc.check(model, plan)
    except Exception as problem:  # other libraries raise what they like
        if peer is None:
            raise
        row["note"] = reason(problem)
    if "seconds" in row:
        row |= {**figures(model), "library": peer.library() if peer else ""}
    said = [f"{column} {value:.4g}" for column, value in row.items() if isinstance(value, float)]
    print(f"{name}: {', '.join(said)} {row['note']}", flush=True)
    return row


def measure(
    dense: nn.Module,
    pattern: str,
    methods: Sequence[str],
    calibration: Sequence[Tensor],
    validation: Sequence[Tensor],
) -> list[dict[str, str | float]]:
    """A row for dense and one for each method."""
    dense_nll = evaluate.perplexity(dense, validation).nll

    def figures(model: nn.Module) -> dict[str, float]:
        agreement = evaluate.compare(model, dense, validation)
        nll = evaluate.perplexity(model, validation).nll
        return {"nll": nll, "dnll": nll - dense_nll, "kl": agreement.kl, "top1": agreement.top1}

    plan = sc.plan(dense, pattern)
    rows: list[dict[str, str | float]] = [{"method": "dense", "nll": dense_nll, "dnll": 0.0}]
    rows += [row_of(name, dense, plan, calibration, figures) for name in methods]
    measured = [row for row in rows if "dnll" in row]
    loss = {row["method"]: float(row["dnll"]) for row in measured}
    for row in measured:
        for share, baseline in (("r_m", "magnitude"), ("r_s", PAPER)):
            known = baseline in loss
            row[share] = 1 - float(row["dnll"]) / loss[baseline] if known else ""
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--patterns", default="2:4,4:8,unstructured:0.5@layer")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rows", default="128", help="calibration rows, such as 32,512")
    parser.add_argument("--seed", type=int, default=0, help="which calibration rows")
    parser.add_argument("--validation-rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    options = parser.parse_args()

    dense = load_folder(options.model, torch.float32).to(options.device)
    tokens, end = f"{options.model / 'tokens.safetensors'}:", end_of_text(options.model)

    def rows_of(key: str, rows: int, seed: int) -> tuple[list[Tensor], int]:
        """Batches on the device, and of how many documents they are."""
        dealt = stored_rows(tokens + key, rows, options.batch, end, seed)
        on_device = [ids.to(options.device) for ids in dealt.batches if isinstance(ids, Tensor)]
        return on_device, dealt.different

    validation, _ = rows_of("validation", options.validation_rows, 0)
    for rows, pattern in itertools.product(
        map(int, options.rows.split(",")), options.patterns.split(",")
    ):
        calibration, documents = rows_of("calibration", rows, options.seed)
        measured = measure(dense, pattern, options.methods, calibration, validation)
        shared = {
            "model": options.model.name,
            "pattern": pattern,
            "calibration_rows": rows,
            "seed": options.seed,
            "documents": documents,
            "validation_rows": options.validation_rows,
            "batch": options.batch,
        }
        append(options.output, "accuracy", [{**shared, **row} for row in measured], options.device)


if __name__ == "__main__":
    main()
