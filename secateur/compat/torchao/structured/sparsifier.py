"""Structured pruners: whole channels are masked during training, and `prune` removes them.

`secateur.prune.channels` finds from the model's graph which channels go together: one row of the
layer that makes a channel, the same row of the layers that are added to it, the scale and shift of
its norm, and the columns of the layers that read it.
"""

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from secateur.compat.torchao.base_sparsifier import BaseSparsifier, require_state
from secateur.compat.torchao.fake_sparsity import (
    attach,
    mask_of,
    require_tensor,
    unmasked,
)
from secateur.compat.torchao.groups import Group, make_groups, require_model
from secateur.compat.torchao.names import closest, in_short
from secateur.compat.torchao.structured.mask import FakeStructuredSparsity, Masked
from secateur.compat.torchao.structured.prepare import (
    layer_config,
    masked_with,
    possible,
    require_channels,
)
from secateur.model.blocks import Batch
from secateur.model.outputs import on_device
from secateur.prune import channels as engine
from secateur.prune.channels import Channels, Removed

__all__ = ["BaseStructuredSparsifier", "FakeStructuredSparsity"]


class BaseStructuredSparsifier(BaseSparsifier):
    """Masks on the channels of a model, which `prune` removes; a subclass chooses which go.

    `update_mask(self, module, tensor_name, ...)` is called as in `BaseSparsifier`. The mask of a
    tensor has one bool for each of its channels: the rows of a linear layer or convolution, the
    columns of an embedding. Channels that depend on one another form a unit, which goes as a whole;
    `least` chooses whole units.

    With `prune_bias` (a setting of each tensor, True by default), a channel's bias and its norm's
    scale and shift are masked with it. Otherwise they stay, and the constant that they make of the
    channel goes into the biases of the layers that read it.

    Raises:
        TypeError: if the class has no `update_mask`.
    """

    def __init__(self, defaults: Mapping[str, Any] | None = None, patterns: None = None) -> None:
        if patterns is not None:
            raise ValueError(
                f"{type(self).__name__} follows the model's graph and knows no patterns, got "
                f"{in_short(patterns)}: leave them out, which layers go together is found"
            )
        super().__init__(defaults)
        self.defaults = {"prune_bias": True, **self.defaults}
        self.channels: Channels | None = None
        self.left: dict[str, str] = {}
        self._inputs: Batch = ()
        self._masked: list[Masked] = []
        self._stuck: dict[int, str] = {}

    def prepare(
        self,
        model: nn.Module,
        config: Sequence[Mapping[str, Any]] | None = None,
        example_inputs: Batch | None = None,
    ) -> None:
        """Put a mask on each tensor that the config names, and on all that its channels go with.

        `example_inputs` is a batch that the model takes: a tensor, a tuple of positional or a dict
        of keyword arguments. It should have several samples, because what is the same in all of
        them counts as constant. Without it a batch is guessed from the layers that read the inputs.

        Without a config, `prepare` takes the weights of all linear layers, convolutions and
        recurrent layers whose channels can go so that at most the model's outputs become fewer, of
        which it warns; `left` says why the others were left out. If they are named explicitly,
        channels that a LayerNorm or RMSNorm runs over can go as well: it then normalises the rest.

        A warning names what `prune` will have to leave as zeros: channels that an operation cannot
        do without, which are masked alone, or whose constant a layer cannot absorb.

        Cost: an export of the model and a run.

        Raises:
            ValueError: before the model is changed, if the sparsifier is prepared already, torch
                cannot export the model, or a tensor or its settings cannot be used, with the
                operation and layer because of which its channels must stay.
        """
        self._require_free("squash_mask or prune first")
        require_model("prepare", model)
        followed = engine.follow(model, example_inputs)
        left: dict[str, str] = {}
        if config is None:
            self.make_config_from_model(model)
            config = possible(model, followed.channels, self.config or (), left)
        groups = [self.complete(group) for group in make_groups(model, config, self.defaults)]
        names = [group["tensor_fqn"] for group in groups]
        for name in names:
            require_channels(followed.channels, name)
        channels, stuck = engine.isolated(followed.channels, names)
        masked = masked_with(model, channels, groups)
        most = engine.all_but_one(channels, names)
        parts = [(each.name, each.dim) for each in masked]
        values = engine.zeroed(model, channels, parts, most)
        _, _, held = engine.removable(followed, values, most)
        initial = {g["tensor_fqn"]: _initial_mask(g) for g in groups}
        before = dict(vars(self))
        self._begin(model, config, groups)
        self.channels, self._masked, self._stuck = channels, masked, stuck
        self.left, self._inputs = left, followed.batch
        with engine.as_it_was(model):
            try:
                self._prepare()
                for fqn, mask in initial.items():
                    if mask is not None:
                        self.keep(fqn, mask)
                self._mask_all(self._removed())
                self._tell_zeros("prepare", held | stuck)
            except BaseException:
                vars(self).update(before)
                raise

    def make_config_from_model(
        self,
        model: nn.Module,
        SUPPORTED_MODULES: Collection[type[nn.Module]] = (nn.Linear, _ConvNd, nn.RNNBase),
    ) -> None:
        """Set `config` to the weights of all layers of these types; `prepare` chooses from it."""
        self.config = layer_config(model, tuple(SUPPORTED_MODULES))

    def _prepare(self, *args: Any) -> None:
        """Put masks of ones on the tensors of `groups` and on everything their channels go with."""
        for each in self._masked:
            tensor = unmasked(each.module, each.tensor_name)
            keep = torch.ones(tensor.shape[each.dim], dtype=torch.bool).to(tensor.device)
            attach(each.module, each.tensor_name, FakeStructuredSparsity(keep, each.dim))

    def keep(self, tensor_fqn: str, mask: Bool[Tensor, " channels"]) -> None:
        """Make this the mask of a tensor that the config names."""
        group = next(group for group in self.groups if group["tensor_fqn"] == tensor_fqn)
        own = mask_of(group["module"], group["tensor_name"])
        own.data = mask.to(own.device, torch.bool)

    def _complete_masks(self) -> None:
        """Mask what goes together with what `update_mask` has dropped."""
        self._mask_all(self._removed())

    def least(
        self,
        tensor_fqn: str,
        score: Callable[[Float[Tensor, "channels weights"]], Float[Tensor, " channels"]],
        zeros: Callable[[int], int],
    ) -> Bool[Tensor, " channels"]:
        """The mask that drops the `zeros(n)` of n units of lowest score; ties keep the lower.

        Tensors that have a unit in common are scored together: the score of a unit is the sum over
        its channels in all tensors of the config.

        Raises:
            ValueError: if no unit would be left.
        """
        channels = self._channels()
        groups = {group["tensor_fqn"]: group for group in self.groups}
        scores = {}
        for name in channels.pool(tensor_fqn, groups):
            weight = unmasked(groups[name]["module"], groups[name]["tensor_name"])
            scores[name] = score(weight.movedim(channels.dim_of(name), 0).flatten(1))
        return engine.least(channels, scores, zeros)[tensor_fqn]

    def prune(self) -> nn.Module:
        """Remove what is masked and return the model: plain modules of the smaller sizes.

        In eval mode it computes what the masked model did, up to rounding, except that norms over
        removed channels run over those that are left. A channel that is a constant which the next
        layer cannot absorb stays as zeros, with a warning. Parameters stay the same objects; create
        the optimizer anew, because its state has the old shapes.

        Cost: two exports of the model and a run.

        Raises:
            ValueError: before anything is changed, if sizes in a forward stand in the way, with the
                operation and layer.
        """
        self._require_masks("prune")
        model, channels, masked = self.model, self._channels(), self._removed()
        assert model is not None
        self.state = self.state  # with the masks that are about to be removed
        with engine.as_it_was(model):
            self._mask_all(masked)
            self._detach(squash=True)  # what cannot be removed stays as zeros
            # The model may have been moved since it was prepared.
            followed = engine.follow(model, _like(on_device(self._inputs, model), model))
            if followed.channels.states.keys() != channels.states.keys():
                raise ValueError(
                    f"prune needs the {type(model).__name__} that was prepared, it has other "
                    "parameters now: squash_mask and prepare it again"
                )
            held = engine.remove_(model, followed, masked)
            gone = {unit: why for unit, why in self._stuck.items() if masked[unit]}
            self._tell_zeros("prune", held | gone)
        self._squashed()
        return model

    def _squashed(self) -> None:
        self._masked, self.channels = [], None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Copy the masks, settings and state of another sparsifier.

        Raises:
            ValueError: before anything is changed, if this one is not prepared for the same tensors
                (`strict=False` ignores tensors that it lacks), or a mask does not fit.
        """
        self._require_masks("load_state_dict")
        require_state(state_dict)
        mine = {group["tensor_fqn"]: group for group in self.groups}
        saved = {group["tensor_fqn"]: group for group in state_dict["groups"]}
        if strict and (other := set(mine) ^ set(saved)):
            name = sorted(other)[0]
            raise ValueError(
                f"load_state_dict needs the tensors that were prepared, {name} is in one of the "
                f"two only: prepare the same config; closest are {closest(name, mine)}"
            )
        both = [name for name in mine if name in saved]
        masks = {n: state_dict["state"].get(n, {}).get("mask") for n in both}
        for name in both:
            masks[name] = _initial_mask({"mask": masks[name], "tensor_fqn": name})
        before = self._masks()
        try:
            for name, mask in masks.items():
                if mask is not None:
                    self.keep(name, mask)
            self._mask_all(self._removed())
        except BaseException:
            for name, mask in before.items():
                self.keep(name, mask)
            raise
        local = {"module", "module_fqn", "tensor_name", "tensor_fqn", "mask"}
        for name in both:
            mine[name].update(
                {k: copy.deepcopy(v) for k, v in saved[name].items() if k not in local}
            )
            values = state_dict["state"].get(name, {})
            self.state[name] = {k: copy.deepcopy(v) for k, v in values.items() if k != "mask"}

    def __getstate__(self) -> dict[str, Any]:
        """As in `BaseSparsifier`: the settings and masks, without the model."""
        return {**super().__getstate__(), "_masked": [], "channels": None}

    def _channels(self) -> Channels:
        assert self.channels is not None
        return self.channels

    def _masks(self) -> dict[str, Tensor]:
        return {
            g["tensor_fqn"]: mask_of(g["module"], g["tensor_name"]).clone() for g in self.groups
        }

    def _removed(self) -> Removed:
        """The units that the masks of the config's tensors drop.

        Raises:
            ValueError: if a unit is dropped in part, or a tensor has none left.
        """
        masks = {
            group["tensor_fqn"]: mask_of(group["module"], group["tensor_name"]).cpu() != 0
            for group in self.groups
        }
        return engine.dropped(self._channels(), masks)

    def _mask_all(self, removed: Removed) -> None:
        """Mask what goes together with what the config's tensors drop."""
        channels = self._channels()
        for each in self._masked:
            keep = torch.from_numpy(~removed[channels.states[each.name, each.dim]])
            mask = mask_of(each.module, each.tensor_name)
            mask.data = keep.to(mask.device)

    def _tell_zeros(self, verb: str, held: Mapping[int, str]) -> None:
        """Warn that channels cannot be removed and stay as zeros, if some do."""
        staying = {
            group["tensor_fqn"]: [unit for unit in units if unit in held]
            for group in self.groups
            if not held.keys().isdisjoint(
                units := self._channels().units(group["tensor_fqn"]).tolist()
            )
        }
        if not staying:
            return
        first, *others = staying
        biases = any(
            not group["prune_bias"] and not self._stuck.keys() & set(staying[group["tensor_fqn"]])
            for group in self.groups
            if group["tensor_fqn"] in staying
        )
        warnings.warn(
            f"{verb}: masked channels of {first}"
            f"{f' and of {len(others)} more' if others else ''} cannot be removed and stay "
            f"as zeros: {held[staying[first][0]]}: "
            f"{'with prune_bias=True they may go' if biases else 'leave it out of the config'}",
            UserWarning,
            stacklevel=3,
        )

    def _masked_tensors(self) -> list[tuple[nn.Module, str]]:
        return [(each.module, each.tensor_name) for each in self._masked]


def _initial_mask(group: Group) -> Tensor | None:
    mask = group.pop("mask", None)
    if mask is None:
        return None
    require_tensor(mask, str(group.get("tensor_fqn", "a tensor")))
    keep: Tensor = mask != 0
    return keep


def _like(batch: Batch, model: nn.Module) -> Any:
    """The batch in the model's precision."""
    tensors = (*model.parameters(), *model.buffers())
    like = next((t for t in tensors if t.is_floating_point()), torch.zeros(0))
    return pytree.tree_map_only(
        Tensor, lambda t: t.to(like.dtype) if t.is_floating_point() else t, batch
    )
