"""The base class of sparsifiers: prepare a model, step its masks, squash them into the weights."""

import contextlib
import copy
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.compat.torchao.fake_sparsity import (
    FakeSparsity,
    as_mask,
    detach,
    has_mask,
    mask_of,
    put_mask,
    require_binary,
    unmasked,
)
from secateur.compat.torchao.groups import (
    LOCAL,
    Group,
    attach_masks,
    detach_masks,
    layer_weights,
    locate,
    make_groups,
    require_model,
    require_usable,
    settings_to_keep,
)
from secateur.compat.torchao.names import in_short
from secateur.compat.torchao.shipped import register_sparsifier
from secateur.compat.torchao.swap import require_mapping, swap_prepared


class BaseSparsifier:
    """Masks on the tensors of a model, which a subclass chooses in `update_mask`.

    `step` calls `update_mask(self, module, tensor_name, ...)` for each tensor, with the settings of
    its group: those that the method names, or all if it takes `**kwargs`. The method writes into
    `module.parametrizations[tensor_name][0].mask`, or replaces the `data` of that tensor.
    `defaults` are the settings of a tensor unless the config of `prepare` overrides them. `groups`
    holds the settings, `state[tensor_fqn]` the `mask` and what a subclass keeps between steps.

    Raises:
        TypeError: if the class has no `update_mask`.
        ValueError: if `defaults` are no dict.
    """

    update_mask: Callable[..., None]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "update_mask" in vars(cls):
            cls.update_mask = _with_any_settings(vars(cls)["update_mask"])

    def __init__(self, defaults: Mapping[str, Any] | None = None) -> None:
        if not callable(getattr(type(self), "update_mask", None)):
            raise TypeError(
                f"{type(self).__name__} needs a method update_mask(self, module, tensor_name, ...)"
            )
        if defaults is not None and not isinstance(defaults, Mapping):
            raise ValueError(
                f"{type(self).__name__} needs a dict of settings, got the "
                f"{type(defaults).__name__} {in_short(defaults)}: write "
                f"{type(self).__name__}({{'sparsity_level': 0.5}}) for half of each tensor"
            )
        self.defaults = dict(defaults or {})
        self.model: nn.Module | None = None
        self.config: Sequence[Mapping[str, Any]] | None = None
        self.groups: list[Group] = []
        self._state: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        self.enable_mask_update = True
        self.step_count = 0
        self._pickled: dict[str, Any] | None = None

    @property
    def state(self) -> defaultdict[str, dict[str, Any]]:
        """For each tensor its mask, even after `squash_mask`, and whatever was stored beside it.

        The mask is looked up each time, so it is the one in use even after `model.to()`.
        """
        for group in self.groups:
            if has_mask(group["module"], group["tensor_name"]):
                mask = mask_of(group["module"], group["tensor_name"])
                self._state[group["tensor_fqn"]]["mask"] = mask
        return self._state

    @state.setter
    def state(self, state: Mapping[str, dict[str, Any]]) -> None:
        self._state = defaultdict(dict, state)

    def complete(self, group: Group) -> Group:
        """The group with its gaps filled; subclasses raise a ValueError for impossible settings."""
        return group

    def prepare(self, model: nn.Module, config: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Put a mask of ones, or the config's `mask`, on each tensor that the config names.

        The config is a list of dicts `{"tensor_fqn": "layer.weight", ...}` whose other keys are
        settings of that tensor; None stands for the weights of all linear layers. After
        `squash_mask` the sparsifier can be prepared again and starts afresh.

        Raises:
            ValueError: before the model is changed, if the sparsifier is prepared already, or a
                tensor or its settings cannot be used.
        """
        self._require_free("squash_mask them first")
        require_model("prepare", model)
        if config is None:
            self.make_config_from_model(model)
            config = self.config
        groups = [self.complete(group) for group in make_groups(model, config, self.defaults)]
        before = dict(vars(self))
        self._begin(model, config, groups)
        try:
            self._prepare()
        except BaseException:
            attached = [g for g in groups if has_mask(g["module"], g["tensor_name"])]
            detach_masks(attached, squash=False)
            vars(self).update(before)
            raise

    def make_config_from_model(
        self, model: nn.Module, SUPPORTED_MODULES: Collection[type[nn.Module]] = (nn.Linear,)
    ) -> None:
        """Set `config` to what None stands for: the weights of the layers of these types.

        It leaves out weights that are tied to others, computed by a parametrization, or read by a
        module that does not call the layer (nn.MultiheadAttention).
        """
        self.config = layer_weights(model, tuple(SUPPORTED_MODULES))

    def _prepare(self, *args: Any) -> None:
        """Put the masks on the tensors of `groups`, which `prepare` has filled."""
        attach_masks(self.groups)

    @torch.no_grad()
    def step(self, use_path: bool = True) -> None:
        """Update all masks, or none if one fails or `enable_mask_update` is False.

        `use_path` is accepted without effect: tensors are always found through their module.
        """
        self._require_masks("step")
        self.step_count += 1
        if not self.enable_mask_update:
            return
        with _masks_as_they_were(self._masked_tensors()):
            for group in self.groups:
                self.update_mask(**group)
                mask = mask_of(group["module"], group["tensor_name"])
                require_binary(mask, group["tensor_fqn"])
            self._complete_masks()

    def squash_mask(
        self,
        params_to_keep: Sequence[str] | None = None,
        params_to_keep_per_layer: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Make the zeros part of the weights, which become plain parameters, the same objects.

        The settings to keep, for all tensors or by module name, are written to the module's
        `sparse_params`.

        Raises:
            ValueError: before anything is changed, if a setting or module is unknown (with the
                closest names), two tensors of a module would keep different values, or there is
                no mask.
        """
        self._require_masks("squash_mask")
        kept = settings_to_keep(self.groups, params_to_keep or (), params_to_keep_per_layer or {})
        self.state = self.state  # with the masks that are now removed
        self._detach(squash=True)
        for module, parameters in kept.items():
            # nn.Module's own setter only knows tensors and modules.
            object.__setattr__(module, "sparse_params", parameters)
        self._squashed()

    def convert(
        self,
        module: nn.Module,
        mapping: Mapping[type[nn.Module], Any] | None = None,
        inplace: bool = False,
        parameterization: type[nn.Module] = FakeSparsity,
    ) -> nn.Module:
        """The model with each prepared leaf module of a type T replaced by `mapping[T].from_dense`.

        `from_dense` gets the prepared module, whose weight shows its zeros. If the model itself is
        such a module, only the result is replaced.

        Raises:
            ValueError: without a mapping, or if a class in it has no `from_dense`.
        """
        mapping = require_mapping(mapping)
        model = module if inplace else copy.deepcopy(module)
        return swap_prepared(model, mapping, parameterization)

    def state_dict(self) -> dict[str, Any]:
        """Copies of `{"state": {tensor_fqn: {"mask": ...}}, "groups": [...]}`: no modules.

        After `squash_mask` it still has the masks that were squashed.
        """
        if self._pickled is not None:
            return copy.deepcopy(self._pickled)
        kept = [{k: v for k, v in group.items() if k not in LOCAL} for group in self.groups]
        return copy.deepcopy({"state": dict(self.state), "groups": kept})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Copy the masks, settings and state of another sparsifier.

        Afterwards exactly the tensors of that state are masked: others that were prepared become
        plain parameters. `strict=False` ignores tensors that the model does not have.

        Raises:
            ValueError: before anything is changed, if `prepare` has not named the model, or a
                tensor, mask or setting does not fit it.
        """
        if self.model is None:
            raise ValueError("load_state_dict needs a model: call prepare(model, config) first")
        require_state(state_dict)
        groups = self._loaded_groups(self.model, state_dict, strict)
        states = state_dict["state"]
        masks = [_loaded_mask(group, states.get(group["tensor_fqn"], {})) for group in groups]
        loaded = {(group["module"], group["tensor_name"]) for group in groups}
        attached = [g for g in self.groups if has_mask(g["module"], g["tensor_name"])]
        attach_masks([g for g in groups if not has_mask(g["module"], g["tensor_name"])])
        dropped = [g for g in attached if (g["module"], g["tensor_name"]) not in loaded]
        detach_masks(dropped, squash=False)
        for group, mask in zip(groups, masks, strict=True):
            mask_of(group["module"], group["tensor_name"]).data = mask
        self.groups = groups
        self.state = {
            fqn: copy.deepcopy({key: value for key, value in values.items() if key != "mask"})
            for fqn, values in states.items()
        }

    def _loaded_groups(
        self, model: nn.Module, state_dict: Mapping[str, Any], strict: bool
    ) -> list[Group]:
        classes = {
            g["tensor_fqn"]: {"parametrization": g["parametrization"]}
            for g in self.groups
            if "parametrization" in g
        }
        groups = []
        for saved in state_dict["groups"]:
            fqn = saved["tensor_fqn"]
            try:
                found = locate(model, fqn, "load_state_dict")
            except ValueError:
                if strict:
                    raise
                continue
            require_usable(found)
            # torchao leaves a config's initial mask in its groups; the state has the current one.
            settings = self.defaults | {k: saved[k] for k in saved if k != "mask"}
            groups.append(self.complete(copy.deepcopy(settings) | classes.get(fqn, {}) | found))
        return groups

    def _begin(
        self, model: nn.Module, config: Sequence[Mapping[str, Any]] | None, groups: list[Group]
    ) -> None:
        """Start afresh with this model."""
        self.model, self.config, self.groups, self.state = model, config, groups, {}
        self.step_count, self._pickled = 0, None

    def _masked_tensors(self) -> list[tuple[nn.Module, str]]:
        """Every tensor with a mask of this sparsifier, as a module and the name in it."""
        return [(group["module"], group["tensor_name"]) for group in self.groups]

    def _complete_masks(self) -> None:
        """Do what a subclass has to do once every mask is updated."""

    def _squashed(self) -> None:
        """Do what a subclass has to do once the masks are squashed."""

    def _detach(self, *, squash: bool) -> None:
        """Remove all masks, with their zeros made part of the parameters or without."""
        for module, tensor_name in reversed(self._masked_tensors()):
            detach(module, tensor_name, squash=squash)

    def _require_free(self, how: str) -> None:
        """Raise if masks of an earlier `prepare` are in place; `how` says how to remove them."""
        if any(has_mask(group["module"], group["tensor_name"]) for group in self.groups):
            raise ValueError(
                f"prepare needs a sparsifier that is free, this {type(self).__name__} holds masks "
                f"of {len(self.groups)} tensors: {how}, or make another"
            )

    def _require_masks(self, verb: str) -> None:
        if not self.groups:
            raise ValueError(
                f"{verb} needs a prepared model, this {type(self).__name__} has none: call "
                "prepare(model, config) first"
            )
        for group in self.groups:
            if not has_mask(group["module"], group["tensor_name"]):
                raise ValueError(
                    f"{verb} needs masks, {group['tensor_fqn']} has none since squash_mask: call "
                    "prepare(model, config) again"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> "BaseSparsifier":
        """A copy whose model is a copy as well: the one in `memo` if both are copied together."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        """The attributes without the model, because torch cannot pickle parametrized modules.

        The unpickled sparsifier has the settings and the `state_dict()`, and can be prepared.
        """
        return {**vars(self), "model": None, "groups": [], "_pickled": self.state_dict()}

    def __repr__(self) -> str:
        tensors = "".join(
            f"\n  {g['tensor_fqn']}: "
            + ", ".join(f"{k}={v!r}" for k, v in g.items() if k not in (*LOCAL, "tensor_fqn"))
            for g in self.groups
        )
        return f"{type(self).__name__}({tensors}\n)" if tensors else f"{type(self).__name__}()"


register_sparsifier(BaseSparsifier)


def _with_any_settings(function: Callable[..., None]) -> Callable[..., None]:
    """The method, ignoring keywords that it does not name: a subclass may pass on all it gets."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return function
    return functools.wraps(function)(
        lambda self, *args, **settings: function(
            self, *args, **{name: settings[name] for name in settings if name in parameters}
        )
    )


def require_state(state_dict: Mapping[str, Any]) -> None:
    """Raise unless this is the state of a sparsifier."""
    if missing := {"state", "groups"} - set(state_dict):
        raise ValueError(
            f"load_state_dict needs a sparsifier's state_dict, {sorted(missing)[0]!r} is not "
            "in it: the model's own is for model.load_state_dict"
        )


@contextlib.contextmanager
def _masks_as_they_were(tensors: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """Restore the masks of these tensors if the block raises."""
    masks = [mask_of(*tensor) for tensor in tensors]
    before = [mask.clone() for mask in masks]
    try:
        yield
    except BaseException:
        for tensor, mask, values in zip(tensors, masks, before, strict=True):
            mask.data = values
            put_mask(*tensor, mask)
        raise


def _loaded_mask(group: Group, values: Mapping[str, Any]) -> Tensor:
    tensor = unmasked(group["module"], group["tensor_name"])
    mask = values.get("mask")
    return as_mask(torch.ones_like(tensor) if mask is None else mask, tensor, group["tensor_fqn"])
