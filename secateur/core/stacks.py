"""Experts that transformers stores as stacks: which module holds some, and what it computes.

A stack is a parameter `[experts, out, in]`, or `[experts, in, out]` where its module says
`is_transposed`. What multiplies is told from outside, matrix by matrix, so that a half of the
library may run experts as layers of its own. transformers is looked up, since to import it costs
seconds.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

INTERFACE = "transformers.integrations.moe"  # has the table of ways to run experts
UP, GATE_UP, DOWN = "up_proj", "gate_up_proj", "down_proj"

# (stack, index of the expert, its tokens' rows) -> their products with the matrix, without bias.
Product = Callable[[str, int, Tensor], Tensor]


def functions() -> Any:
    """Transformers' ways to run experts, by name; none before it has been imported."""
    return getattr(sys.modules.get(INTERFACE), "ALL_EXPERTS_FUNCTIONS", {})


def stacks_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The stacks of a module whose experts transformers runs by its table; none of another."""
    known = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias"))
    by_table = (
        known
        and INTERFACE in sys.modules
        and hasattr(getattr(module, "config", None), "_experts_implementation")
        and not getattr(module, "has_post_expert_norm", False)
    )
    found = module._parameters if by_table else {}
    stacks = {name: found.get(name) for name in (GATE_UP, UP, DOWN)}
    return {name: p for name, p in stacks.items() if p is not None and p.dim() == 3}


def matrix_in(
    module: Any, stacked: Shaped[Tensor, "experts _ _"], index: int
) -> Shaped[Tensor, "out in"]:
    """The matrix of one expert in a stack of the module's, a view."""
    found: Tensor = stacked[index]
    return found.mT if module.is_transposed else found


def routed(
    module: Any,
    product: Product,
    x: Float[Tensor, "tokens in"],
    chosen: Int[Tensor, "tokens k"],
    shares: Float[Tensor, "tokens k"],
    seen: Callable[[int, Tensor], None] | None = None,
) -> Float[Tensor, "tokens in"]:
    """The sum over each token's experts of their outputs, by its shares: what the module computes.

    Tokens are sorted by expert, and each expert that is chosen multiplies its own. `seen` is shown
    each expert's index and what it adds to its tokens.
    """
    if not chosen.numel():
        return torch.zeros_like(x)
    places, k = chosen.flatten(), chosen.shape[1]
    order = places.argsort(stable=True)
    counts = {i: count for i, count in enumerate(places.bincount().tolist()) if count}
    up = GATE_UP if module.has_gate else UP

    def multiplied(stack: str, rows: Tensor) -> Tensor:
        biases = module._parameters.get(f"{stack}_bias") if module.has_bias else None
        parts = zip(counts, rows.split([*counts.values()]), strict=True)
        products = ((i, product(stack, i, part)) for i, part in parts)
        return torch.cat([y if biases is None else y + biases[i] for i, y in products])

    raised = multiplied(up, x[order // k])
    inner = module._apply_gate(raised) if module.has_gate else module.act_fn(raised)
    added = multiplied(DOWN, inner) * shares.flatten()[order, None]
    if seen is not None:
        for i, part in zip(counts, added.split([*counts.values()]), strict=True):
            seen(i, part)
    by_token = torch.empty_like(added).index_copy(0, order, added)
    result: Tensor = by_token.unflatten(0, (-1, k)).sum(1).to(x.dtype)
    return result
