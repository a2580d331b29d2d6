"""Experts stored as 3-D parameters, as transformers stores them: each matrix of a stack a layer.

A stack is `[experts, out, in]`, or `[experts, in, out]` where its module says `is_transposed`. The
layer of an expert's matrix multiplies by the stack's own memory, so that what is written into
its weight is written into the model. While `called_by_expert` is in force, the model runs its
experts through these layers, and each of them sees the tokens that the router sends it.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.core.interrupts import putting_back

# transformers' table of ways to run experts: looked up, since to import it costs seconds.
INTERFACE = "transformers.integrations.moe"
UP, GATE_UP, DOWN = "up_proj", "gate_up_proj", "down_proj"


class Expert(nn.Linear):
    """A matrix `[out, in]` of a stack as a linear layer without bias, in the stack's memory."""

    owner: nn.Module

    def __init__(self, owner: nn.Module, stack: str, index: int) -> None:
        nn.Module.__init__(self)
        self.__dict__["owner"] = owner  # no child: the experts hold this layer's weight
        self.stack, self.index = stack, index
        self.weight = nn.Parameter(
            self.piece_of(self.stacked.detach()), requires_grad=self.stacked.requires_grad
        )
        self.out_features, self.in_features = self.weight.shape
        self.register_parameter("bias", None)
        self.train(owner.training)

    @property
    def stacked(self) -> nn.Parameter:
        """The parameter that holds the matrix among others."""
        parameter = self.owner._parameters[self.stack]
        assert parameter is not None
        return parameter

    def current(self) -> nn.Parameter:
        """The weight, where the stack is now: `.to` gives a parameter other memory."""
        weight = self._parameters["weight"]
        assert weight is not None
        weight.data = self.piece_of(self.stacked.detach())
        return weight

    def piece_of(self, stack: Float[Tensor, "experts _ _"]) -> Float[Tensor, "out in"]:
        """This expert's matrix in a stack of the same shape."""
        piece = stack[self.index]
        return piece.mT if self.owner.is_transposed else piece


def experts_of(module: nn.Module) -> dict[str, Expert]:
    """The matrices of a module that holds stacks of experts, by `stack.index`; none of another."""
    if not _runs_by_interface(module):
        return {}
    return {
        f"{stack}.{index}": Expert(module, stack, index)
        for stack in (GATE_UP, UP, DOWN)
        if (parameter := module._parameters.get(stack)) is not None and parameter.dim() == 3
        for index in range(len(parameter))
    }


def parameter_name(name: str, module: nn.Module) -> str:
    """The name of the parameter that holds this layer's weight, alone or among others."""
    if isinstance(module, Expert):
        return name.rpartition(".")[0]
    return f"{name}.weight" if name else "weight"


def require_no_experts(layers: Mapping[str, nn.Module], what: str) -> None:
    """Raise if a layer is an expert's matrix, which `what` cannot take.

    Raises:
        ValueError: with its name and the remedy.
    """
    for name, module in layers.items():
        if isinstance(module, Expert):
            raise ValueError(
                f"{what} takes no experts in 3-D parameters, {name} is one: leave them out of the "
                "plan (ignore=)"
            )


@contextlib.contextmanager
def called_by_expert(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have the modules that hold these experts call them as layers; their results stay the same."""
    planned: dict[Any, dict[tuple[str, int], Expert]] = {}
    for layer in layers.values():
        if isinstance(layer, Expert):
            planned.setdefault(layer.owner, {})[layer.stack, layer.index] = layer
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
        return _expert_by_expert(module, own, hidden_states, top_k_index, top_k_weights)

    functions = sys.modules[INTERFACE].ALL_EXPERTS_FUNCTIONS
    name = f"secateur-{id(planned)}"
    with putting_back() as stack:
        stack.callback(functions._local_mapping.pop, name, None)
        functions[name] = run
        for config in {id(module.config): module.config for module in planned}.values():
            before = config._experts_implementation
            stack.callback(setattr, config, "_experts_implementation", before)
            config._experts_implementation = name
        yield


def _runs_by_interface(module: nn.Module) -> bool:
    """Whether transformers runs this module by its table of ways to run experts, as known here."""
    known = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias"))
    return (
        known
        and INTERFACE in sys.modules
        and hasattr(getattr(module, "config", None), "_experts_implementation")
        and not getattr(module, "has_post_expert_norm", False)
    )


def _expert_by_expert(
    module: Any,
    own: Mapping[tuple[str, int], Expert],
    x: Float[Tensor, "tokens in"],
    chosen: Int[Tensor, "tokens k"],
    shares: Float[Tensor, "tokens k"],
) -> Float[Tensor, "tokens in"]:
    """The sum over each token's experts of their outputs, by its shares, one expert at a time."""
    up = GATE_UP if module.has_gate else UP
    result = torch.zeros_like(x)
    for index in chosen.unique().tolist():
        token, place = torch.where(chosen == index)
        raised = _linear(module, own, up, index)(x[token])
        inner = module._apply_gate(raised) if module.has_gate else module.act_fn(raised)
        lowered = _linear(module, own, DOWN, index)(inner)
        result.index_add_(0, token, (lowered * shares[token, place, None]).to(result.dtype))
    return result


def _linear(
    module: nn.Module, own: Mapping[tuple[str, int], Expert], stack: str, index: int
) -> Callable[[Tensor], Tensor]:
    """The product with an expert's matrix, and its bias if there is one."""
    layer = own.get((stack, index)) or Expert(module, stack, index)
    biases = module._parameters.get(f"{stack}_bias") if module.has_bias else None
    return layer if biases is None else lambda x: layer(x) + biases[index]
