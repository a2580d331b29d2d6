"""Experts stored as 3-D parameters, as transformers stores them: each matrix of a stack a layer.

A stack is `[experts, out, in]`, or `[experts, in, out]` where its module says `is_transposed`. The
layer of an expert's matrix multiplies by the stack's own memory, so that what is written into
its weight is written into the model. While `called_by_expert` is in force, the model runs its
experts through these layers, and each of them sees the tokens that the router sends it.
"""

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from secateur.core.interrupts import putting_back
from secateur.model.piece import Piece

# transformers' table of ways to run experts: looked up, since to import it costs seconds.
INTERFACE = "transformers.integrations.moe"
UP, GATE_UP, DOWN = "up_proj", "gate_up_proj", "down_proj"


def experts_of(module: nn.Module) -> dict[str, Piece]:
    """The matrices of a module that holds stacks of experts, by `stack.index`; none of another."""
    if not _runs_by_interface(module):
        return {}
    return {
        f"{stack}.{index}": _expert(module, stack, index)
        for stack in (GATE_UP, UP, DOWN)
        if (parameter := module._parameters.get(stack)) is not None and parameter.dim() == 3
        for index in range(len(parameter))
    }


@contextlib.contextmanager
def called_by_expert(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have the modules that hold these experts call them as layers; their results stay the same."""
    planned: dict[Any, dict[tuple[str, int], Piece]] = {}
    for layer in layers.values():
        if isinstance(layer, Piece) and layer.index is not None:
            planned.setdefault(layer.owner, {})[layer.key, layer.index] = layer
    if not planned:
        yield
        return

    def run(
        module: nn.Module,
        hidden_states: Float[Tensor, "tokens in"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens in"]:
        own = planned.get(module, {})
        return expert_by_expert(module, own, hidden_states, top_k_index, top_k_weights)

    with experts_run_by(planned, run):
        yield


@contextlib.contextmanager
def experts_run_by(modules: Collection[Any], run: Callable[..., Tensor]) -> Iterator[None]:
    """Have these modules, which hold stacks of experts, run them by a function of transformers'.

    It is called as `run(module, hidden_states, top_k_index, top_k_weights)`.
    """
    functions = sys.modules[INTERFACE].ALL_EXPERTS_FUNCTIONS
    name = f"secateur-{id(run)}"
    with putting_back() as stack:
        stack.callback(functions._local_mapping.pop, name, None)
        functions[name] = run
        for config in {id(module.config): module.config for module in modules}.values():
            before = config._experts_implementation
            stack.callback(setattr, config, "_experts_implementation", before)
            config._experts_implementation = name
        yield


def _expert(module: nn.Module, stack: str, index: int) -> Piece:
    """The matrix of one expert in a stack."""

    def take(stacked: Shaped[Tensor, "experts _ _"]) -> Shaped[Tensor, "out in"]:
        piece = stacked[index]
        return piece.mT if module.is_transposed else piece

    return Piece(module, stack, f"{stack}.{index}", take, index=index)


def _runs_by_interface(module: nn.Module) -> bool:
    """Whether transformers runs this module by its table of ways to run experts, as known here."""
    known = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias"))
    return (
        known
        and INTERFACE in sys.modules
        and hasattr(getattr(module, "config", None), "_experts_implementation")
        and not getattr(module, "has_post_expert_norm", False)
    )


def expert_by_expert(
    module: Any,
    own: Mapping[tuple[str, int], Piece],
    x: Float[Tensor, "tokens in"],
    chosen: Int[Tensor, "tokens k"],
    shares: Float[Tensor, "tokens k"],
    seen: Callable[[int, Tensor], None] | None = None,
) -> Float[Tensor, "tokens in"]:
    """The sum over each token's experts of their outputs, by its shares, one expert at a time.

    `seen` is shown each expert's index and what it adds to its tokens.
    """
    up = GATE_UP if module.has_gate else UP
    result = torch.zeros_like(x)
    for index in chosen.unique().tolist():
        token, place = torch.where(chosen == index)
        raised = _linear(module, own, up, index)(x[token])
        inner = module._apply_gate(raised) if module.has_gate else module.act_fn(raised)
        lowered = _linear(module, own, DOWN, index)(inner)
        added = lowered * shares[token, place, None]
        if seen is not None:
            seen(index, added)
        result.index_add_(0, token, added.to(result.dtype))
    return result


def _linear(
    module: nn.Module, own: Mapping[tuple[str, int], Piece], stack: str, index: int
) -> Callable[[Tensor], Tensor]:
    """The product with an expert's matrix, and its bias if there is one."""
    layer = own.get((stack, index)) or _expert(module, stack, index)
    biases = module._parameters.get(f"{stack}_bias") if module.has_bias else None
    return layer if biases is None else lambda x: layer(x) + biases[index]
