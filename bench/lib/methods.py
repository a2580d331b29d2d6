"""The methods that prune, by the names of rows and tables, and the row of one of them."""

import copy
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file
from torch import Tensor, nn

import secateur as sc
from bench.lib.cold import reason
from bench.lib.paper import PAPER, sparsegpt_algorithm_1
from bench.lib.peer_methods import PEERS
from secateur.integrations.tokens import sampled_rows
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

    A peer that fails has no figures. What a method of ours raises is raised, even if its zeros
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
