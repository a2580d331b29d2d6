"""WandaSparsifier: a weight's score is its magnitude times its input's norm, as in the paper."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.compat.torchao.base_sparsifier import BaseSparsifier
from secateur.compat.torchao.fake_sparsity import original_of, set_mask, unmasked
from secateur.compat.torchao.groups import Group
from secateur.compat.torchao.names import in_short
from secateur.criteria import wanda
from secateur.model import layers as _layers
from secateur.model.statistics import InputNorm
from secateur.patterns import NM, Pattern, Unstructured
from secateur.reconstruct.methods import score

# The name under which a prepared module holds its observer.
OBSERVER = "activation_post_process"


class PerChannelNormObserver(nn.Module):
    """Passes tensors through and accumulates `norm`, the L2 norm of each channel over all of them.

    Channels are the last dimension. Before the first tensor `norm` is empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self._input_norm: InputNorm | None = None

    @property
    def norm(self) -> Float[Tensor, " channels"]:
        return torch.empty(0) if self._input_norm is None else self._input_norm.value(0)

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        if self._input_norm is None:
            self._input_norm = InputNorm(x.shape[-1], x.device)
        self._input_norm.update(x.reshape(-1, x.shape[-1]), batch=0)
        return x


class WandaSparsifier(BaseSparsifier):
    """Zeros where |W_ij| * ||x_j||_2 is smallest within an output row, or within an N:M group.

    `prepare` observes the inputs of the layers that it masks; run calibration data through the
    model, then `step`. Every step chooses anew from all data so far and the unmasked weight. With a
    `semi_structured_block_size` of m, half of each m consecutive inputs become zero, whatever the
    `sparsity_level`; without one, that share of each row does.

    Source: Wanda, Sun et al., arXiv:2306.11695, eq. 1.
    Raises:
        ValueError: at construction and by `prepare`, if a level is not in [0, 1], the number of a
            layer's inputs is no multiple of m, or its weight does not multiply its input; by
            `step`, if a layer has seen no input.
    """

    def __init__(
        self, sparsity_level: float = 0.5, semi_structured_block_size: int | None = None
    ) -> None:
        _pattern(sparsity_level, semi_structured_block_size)
        super().__init__(
            {
                "sparsity_level": sparsity_level,
                "semi_structured_block_size": semi_structured_block_size,
            }
        )

    def complete(self, group: Group) -> Group:
        module, fqn = group["module"], group["tensor_fqn"]
        pattern = _pattern(group["sparsity_level"], group["semi_structured_block_size"])
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or group["tensor_name"] != "weight":
            raise ValueError(
                f"Wanda needs the weight of a Linear or Conv2d, {fqn} is of a "
                f"{type(module).__name__}: leave it out"
            )
        if reason := _layers.why_not_prunable(module):
            raise ValueError(f"{fqn} cannot be pruned by Wanda: {reason}")
        out, inputs = _layers.matrix(module, unmasked(module, "weight")).shape
        if reason := pattern.why_not((out, inputs)):
            raise ValueError(f"{fqn}: {reason}: choose another block size, or leave it out")
        return group

    def prepare(self, model: nn.Module, config: Sequence[Mapping[str, Any]] | None = None) -> None:
        super().prepare(model, config)
        self._observe()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        before = self.groups
        super().load_state_dict(state_dict, strict)
        now = {group["module"] for group in self.groups}
        _stop_observing(group["module"] for group in before if group["module"] not in now)
        self._observe()

    def _squashed(self) -> None:
        _stop_observing(group["module"] for group in self.groups)

    def update_mask(
        self,
        module: nn.Module,
        tensor_name: str,
        sparsity_level: float,
        semi_structured_block_size: int | None,
        module_fqn: str = "",
        tensor_fqn: str = "",
    ) -> None:
        """Choose the mask of one tensor from its observer's `norm`."""
        name = tensor_fqn or tensor_name
        norm = module.get_submodule(OBSERVER).norm
        assert isinstance(norm, Tensor)
        if not norm.numel():
            raise ValueError(
                f"Wanda needs data, {name} has seen no input since prepare: run batches that reach "
                "it before step, or leave it out of the config"
            )
        weight = _layers.matrix(module, original_of(module, tensor_name))
        scores = score(wanda, name, weight, {"input_norm": norm.to(weight.device)})
        mask = _pattern(sparsity_level, semi_structured_block_size).mask(scores)
        set_mask(module, tensor_name, _layers.from_matrix(module, mask))

    def _observe(self) -> None:
        for module in (group["module"] for group in self.groups):
            if OBSERVER not in module._modules:
                module.add_module(OBSERVER, PerChannelNormObserver())
                module.register_forward_pre_hook(_see_input, with_kwargs=True)


def _see_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Observe the input of a module; a hook without state, so that copies have their own norms."""
    x = args[0] if args else kwargs["input"]
    module.get_submodule(OBSERVER)(_layers.input_rows(module, x.detach()))


def _stop_observing(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _see_input:
                del module._forward_pre_hooks[key]
                del module._forward_pre_hooks_with_kwargs[key]
        module._modules.pop(OBSERVER, None)


def _pattern(level: float, block_size: int | None) -> Pattern:
    if not isinstance(level, Real) or not 0 <= level <= 1:
        raise ValueError(
            f"Wanda needs a sparsity_level from 0 to 1, got {in_short(level)}: 0.5 zeroes half of "
            "each row"
        )
    if block_size is None:
        # A pattern's sparsity is below 1; the closest number to it rounds to a whole row.
        return Unstructured(min(level, math.nextafter(1, 0)))
    if not isinstance(block_size, Integral) or block_size < 2:
        raise ValueError(
            "Wanda needs a semi_structured_block_size of at least 2, got "
            f"{in_short(block_size)}: 4 is 2:4"
        )
    return NM(block_size - block_size // 2, block_size)
