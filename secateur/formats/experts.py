"""`SparseExperts`: experts whose matrices are layers of their own, of which some are packed.

transformers stores the experts of a block as stacks. For packing, such a module is opened: a layer
for each matrix, under the name that plans have for it (`experts.down_proj.3`), so that whatever
packs, measures, saves and loads linear layers does so here.
"""

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from secateur.core.stacks import matrix_in, routed, stacks_of
from secateur.core.undo import Undo
from secateur.core.weights import tied_weights
from secateur.formats.linear import SparseLinear


class SparseExperts(nn.Module):
    """What a module with stacks of experts computes, by a layer for each matrix.

    Each expert that a token is sent to multiplies all of its tokens at once, one expert after
    another. Biases and whatever else the module holds keep their names; a checkpoint has
    `down_proj.3.values` and so on for a packed matrix, `down_proj.3.weight` for a dense one.
    """

    shell: Any  # the module without its stacks

    def __init__(self, dense: Any) -> None:
        super().__init__()
        stacks = stacks_of(dense)
        shell = copy.copy(dense)  # joins the experts' matrices, and is what `unpack_` fills again
        shell._parameters = {**dense._parameters, **dict.fromkeys(stacks)}
        self.__dict__["shell"] = shell  # no child: its tensors are this module's
        for name, parameter in shell._parameters.items():
            if name not in stacks:
                self.register_parameter(name, parameter)
        for name, module in dense._modules.items():
            self.add_module(name, module)
        for name, stacked in stacks.items():
            layers = (_linear(dense, stacked, i) for i in range(len(stacked)))
            self.add_module(name, nn.ModuleList(layers))
        self.stacks = tuple(stacks)
        self.train(dense.training)

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens in"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens in"]:
        """The sum over each token's experts of their outputs, by its shares.

        Raises: ValueError while it is exported.
        """
        if torch.compiler.is_exporting():
            raise ValueError(
                "packed experts cannot be exported, since which of them run follows from the "
                "input: call unpack_(model) first"
            )

        def product(stack: str, index: int, rows: Tensor) -> Tensor:
            found: Tensor = self._modules[stack][index](rows)  # type: ignore[index]
            return found

        self.shell._parameters |= self._parameters  # where they are now
        return routed(self.shell, product, hidden_states, top_k_index, top_k_weights)

    def layers(self) -> dict[str, nn.Module]:
        """The layer of each matrix, by `stack.index`."""
        return {
            f"{stack}.{i}": layer
            for stack in self.stacks
            for i, layer in enumerate(self.get_submodule(stack).children())
        }

    @property
    def is_packed(self) -> bool:
        """Whether any matrix is packed."""
        return any(isinstance(layer, SparseLinear) for layer in self.layers().values())

    def with_layers(self, layers: Mapping[str, nn.Module]) -> "SparseExperts":
        """Experts as these, with other layers for some matrices."""
        made = copy.copy(self)
        made._modules = dict(self._modules)
        for stack in self.stacks:
            own = enumerate(self.get_submodule(stack).children())
            made._modules[stack] = nn.ModuleList(layers.get(f"{stack}.{i}", m) for i, m in own)
        return made

    def own_(self) -> None:
        """Give dense matrices memory of their own, so that the stack's is free."""
        for layer in self.layers().values():
            weight = layer._parameters.get("weight")
            if weight is not None and weight.untyped_storage().nbytes() > weight.nbytes:
                kept = weight.detach().clone()
                layer.weight = nn.Parameter(kept, requires_grad=weight.requires_grad)

    def dense(self) -> nn.Module:
        """The module with stacks that this one was; its layers are dense again."""
        made: Any = copy.copy(self.shell)
        made._parameters = {**self.shell._parameters, **self._parameters}
        for stack in self.stacks:
            weights = [_matrix(layer) for layer in self.get_submodule(stack).children()]
            weights = [w.mT for w in weights] if made.is_transposed else weights
            made._parameters[stack] = nn.Parameter(torch.stack(weights))
        found: nn.Module = made.train(self.training)
        return found


def _matrix(layer: nn.Module) -> Float[Tensor, "out in"]:
    """The weight of a linear layer, without its gradient."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _linear(dense: Any, stacked: Shaped[Tensor, "experts _ _"], index: int) -> nn.Linear:
    """The matrix of an expert as a layer that multiplies by the stack's memory, without bias."""
    weight = matrix_in(dense, stacked.detach(), index)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=stacked.requires_grad)
    return linear


def matrices_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The matrices of all experts in stacks, by name, each as a layer on the stack's memory."""
    return {
        f"{name}.{stack}.{i}": _linear(module, stacked, i)
        for name, module in closed_experts(model).items()
        for stack, stacked in stacks_of(module).items()
        for i in range(len(stacked))
    }


def closed_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with stacks of experts that may be opened, by name.

    Those that a hook looks at, whose forward was replaced, or whose stacks are tied may not.
    """
    found = {name: (m, stacks_of(m)) for name, m in model.named_modules() if name}
    tied = tied_weights(model) if any(stacks for _, stacks in found.values()) else {}
    return {
        name: module
        for name, (module, stacks) in found.items()
        if stacks and not _is_bound(name, module, stacks, tied)
    }


def open_experts_(model: nn.Module, undo: Undo, layers: Collection[str]) -> None:
    """Put layers in the place of stacks that hold matrices of these names."""
    found = {
        name: SparseExperts(module)
        for name, module in closed_experts(model).items()
        if any(layer.startswith(f"{name}.") for layer in layers)
    }
    put_(model, found, undo)


def stack_experts_(model: nn.Module, undo: Undo) -> None:
    """Make stacks of experts again of layers that are all dense."""
    opened = {n: m for n, m in model.named_modules() if isinstance(m, SparseExperts)}
    put_(model, {n: m.dense() for n, m in opened.items() if not m.is_packed}, undo)


def put_(model: nn.Module, replacements: Mapping[str, nn.Module], undo: Undo) -> None:
    """Put each replacement in every place where the module of that name stands."""
    modules = dict(model.named_modules())
    new = {id(modules[name]): replacement for name, replacement in replacements.items()}
    places = [
        (place, module, new[id(module)])
        for place, module in model.named_modules(remove_duplicate=False)
        if id(module) in new
    ]
    for place, module, replacement in places:
        undo.call(model.set_submodule, place, module)
        model.set_submodule(place, replacement)


def _is_bound(
    name: str, module: nn.Module, stacks: Mapping[str, nn.Parameter], tied: Mapping[str, str]
) -> bool:
    """Whether something about the module would be lost if another one stood in its place."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return bool(hooks) or "forward" in vars(module) or any(f"{name}.{s}" in tied for s in stacks)
