"""Experts stored as 3-D parameters, as transformers stores them: each matrix of a stack a layer.

A stack is `[experts, out, in]`, or `[experts, in, out]` where its module says `is_transposed`. The
layer of an expert's matrix multiplies by the stack's own memory, so that what is written into
its weight is written into the model. While `called_by_expert` is in force, the model runs its
experts through these layers, and each of them sees the tokens that the router sends it.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from secateur.core.interrupts import putting_back
from secateur.core.stacks import functions, matrix_in, routed, stacks_of
from secateur.model.piece import Piece


def experts_of(module: nn.Module) -> dict[str, Piece]:
    """The matrices of a module that holds stacks of experts, by `stack.index`; none of another."""
    return {
        f"{stack}.{index}": _expert(module, stack, index)
        for stack, parameter in stacks_of(module).items()
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
    table = functions()
    name = f"secateur-{id(run)}"
    with putting_back() as stack:
        stack.callback(table._local_mapping.pop, name, None)
        table[name] = run
        for config in {id(module.config): module.config for module in modules}.values():
            before = config._experts_implementation
            stack.callback(setattr, config, "_experts_implementation", before)
            config._experts_implementation = name
        yield


def expert_by_expert(
    module: Any,
    own: Mapping[tuple[str, int], Piece],
    x: Float[Tensor, "tokens in"],
    chosen: Int[Tensor, "tokens k"],
    shares: Float[Tensor, "tokens k"],
    seen: Callable[[int, Tensor], None] | None = None,
) -> Float[Tensor, "tokens in"]:
    """What the module computes, each expert's matrix as a layer: one of `own`, if it is there.

    `seen` is shown each expert's index and what it adds to its tokens.
    """

    def product(stack: str, index: int, rows: Tensor) -> Tensor:
        found: Tensor = (own.get((stack, index)) or _expert(module, stack, index))(rows)
        return found

    return routed(module, product, x, chosen, shares, seen)


def _expert(module: nn.Module, stack: str, index: int) -> Piece:
    """The matrix of one expert in a stack."""
    take = partial(_taken, module, index)
    return Piece(module, stack, f"{stack}.{index}", take, index=index)


def _taken(
    module: nn.Module, index: int, stacked: Shaped[Tensor, "experts _ _"]
) -> Shaped[Tensor, "out in"]:
    return matrix_in(module, stacked, index)
