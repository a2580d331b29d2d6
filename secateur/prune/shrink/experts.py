"""Experts: how much each adds to its tokens, and a mixture without some of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.core.float64 import in_float64
from secateur.core.stacks import DOWN, GATE_UP, UP
from secateur.model.blocks import Batch
from secateur.model.experts import expert_by_expert, experts_of, experts_run_by
from secateur.model.outputs import answer, eval_mode


def mixtures_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold stacks of experts, by name.

    Raises:
        ValueError: if the model has none.
    """
    found = {name: module for name, module in model.named_modules() if experts_of(module)}
    if not found:
        raise ValueError(
            f"this {type(model).__name__} has no experts that transformers keeps in stacks: leave "
            "experts at 0"
        )
    return found


def size_of(mixture: nn.Module) -> int:
    """How many experts there are."""
    return 1 + max(piece.index or 0 for piece in experts_of(mixture).values())


@torch.no_grad()
def saliency(
    model: nn.Module, mixtures: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> tuple[dict[str, Float[Tensor, " experts"]], int]:
    """The mean over an expert's tokens of ||g f(x)||, and how many experts a token has.

    f is the expert, g the router's weight for the token; an expert that sees no token has 0.

    Cost: a run of the model on the batches, its experts one by one.
    Source: REAP, Lasby et al. 2025, arXiv:2510.13999, eq. 9.
    """
    names = {module: name for name, module in mixtures.items()}
    sums = {
        name: torch.zeros(size_of(module), dtype=torch.float64, device="cpu")
        for name, module in mixtures.items()
    }
    tokens = {name: torch.zeros_like(total) for name, total in sums.items()}
    most = 0

    def run(
        module: nn.Module,
        hidden_states: Float[Tensor, "tokens in"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens in"]:
        nonlocal most
        most = max(most, top_k_index.shape[1])
        name = names[module]

        def seen(index: int, added: Float[Tensor, "tokens out"]) -> None:
            sums[name][index] += in_float64(added).norm(dim=1).sum().cpu()
            tokens[name][index] += len(added)

        return expert_by_expert(module, {}, hidden_states, top_k_index, top_k_weights, seen)

    with eval_mode(model), experts_run_by(mixtures.values(), run):
        for i, batch in enumerate(batches):
            answer(model, batch, f"batch {i}")
    return {name: sums[name] / tokens[name].clamp(min=1) for name in sums}, most


def drop_experts_(model: nn.Module, name: str, kept: Int[Tensor, " kept"]) -> None:
    """Take experts out of the stacks, and their rows out of the router."""
    mixture: Any = model.get_submodule(name)
    experts = size_of(mixture)
    parent = model.get_submodule(name.rpartition(".")[0])
    routers = [child for child in parent.children() if child is not mixture]
    holders = [
        mixture,
        *(m for router in routers if _routes(router, experts) for m in router.modules()),
    ]
    for module in holders:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.dim() and len(tensor) == experts:
                tensor.data = tensor.data.index_select(0, kept.to(tensor.device))
                tensor.grad = None


# --- hidden units ---------------------------------------------------------------------------------


def inner_width(mixture: nn.Module) -> int:
    """How many hidden units an expert has."""
    return int(next(p for p in experts_of(mixture).values() if p.key == DOWN).in_features)


def rows_of_units(mixture: Any) -> Int[Tensor, "rows units"]:
    """The rows of an expert's first matrix that make each hidden unit: two where it has a gate.

    They follow from the gradient of each unit: some models keep gates and units in halves, some in
    turns.
    """
    units = inner_width(mixture)
    if not mixture.has_gate:
        return torch.arange(units, device="cpu")[None]
    generator = torch.Generator().manual_seed(0)
    raised = torch.rand(2 * units, generator=generator, dtype=torch.float64, device="cpu") + 0.5
    number = torch.arange(units, dtype=torch.float64, device="cpu")
    with torch.enable_grad():
        joined = mixture._apply_gate(raised.requires_grad_()[None])[0]
        (slopes,) = torch.autograd.grad(joined.sum(), raised, retain_graph=True)
        (weighted,) = torch.autograd.grad((joined * number).sum(), raised)
    unit_of_row = (weighted / slopes).round()
    rows: Tensor = unit_of_row.argsort(stable=True).view(units, 2).mT
    return rows


@torch.no_grad()
def drop_units_(mixture: Any, kept: Int[Tensor, "experts kept"]) -> None:
    """Take hidden units out of the stacks: each expert keeps units of its own, as many as others.

    What is left lies in the order in which it lay.
    """
    rows = rows_of_units(mixture)
    up = GATE_UP if mixture.has_gate else UP
    making = torch.stack([rows[:, units].flatten().sort().values for units in kept])
    sides = {up: (making, mixture.is_transposed), DOWN: (kept, not mixture.is_transposed)}
    for stack, (ids, in_columns) in sides.items():
        parameter = mixture._parameters[stack]
        dim = 1 if in_columns else 0
        parts = [
            one.index_select(dim, of_expert.to(one.device))
            for one, of_expert in zip(parameter, ids, strict=True)
        ]
        parameter.data, parameter.grad = torch.stack(parts), None
    if (bias := mixture._parameters.get(f"{up}_bias")) is not None:
        bias.data, bias.grad = bias.data.gather(1, making.to(bias.device)), None


def _routes(module: nn.Module, experts: int) -> bool:
    """Whether the module's one matrix has a row for each expert."""
    matrices = [p for p in module.parameters() if p.dim() > 1]
    return len(matrices) == 1 and len(matrices[0]) == experts
