"""The config of a smaller model, found by trial: the one from which its class makes these shapes.

A config of transformers says sizes as numbers, under names that differ from family to family. An
entry that equals a size of before is a candidate. A choice of entries is right if the class, made
anew from them, has every tensor in the shape that is there, and returns the same for the first
batch with these very tensors. So what is saved is loaded by anything that reads the family.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.model.blocks import Batch, tensors_of
from secateur.model.outputs import answer, eval_mode

# The entry that families have, or read if it is there, for the width of a head, which stays.
HEAD_DIM = "head_dim"

# How many entries may change together: query heads, heads of keys and values, their width.
TOGETHER = 3

# A part of a config, as a path of attributes, and the name of an entry in it.
Entry = tuple[tuple[str, ...], str]
Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class Sizes:
    """What has become smaller: sizes before and after, and what a config may have to say now.

    `head` is the width of a head, for configs that would divide by the number of heads; `gone` are
    the indices of blocks that are gone, of `blocks`; `uniform` is false if layers may have become
    different.
    """

    changes: Sequence[tuple[int, int]]
    head: int | None = None
    gone: Sequence[int] = ()
    blocks: int = 0
    uniform: bool = True


def config_of(model: nn.Module) -> Any:
    """The model's config if its class is made from one, as those of transformers are; else None."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "to_dict") and hasattr(model, "save_pretrained") else None


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of all parameters and buffers, under all their names."""
    return {
        **{name: p.shape for name, p in model.named_parameters(remove_duplicate=False)},
        **{name: b.shape for name, b in model.named_buffers(remove_duplicate=False)},
    }


@dataclass(frozen=True)
class Fit:
    """Entries to change, with new values, and why the config's class refuses them, or None."""

    changed: Mapping[Entry, Any]
    refusal: str | None


def fitting(model: nn.Module, sizes: Sizes, shapes: Shapes) -> Iterator[Fit]:
    """The changes of the config that make these shapes; those of the fewest entries come first.

    Cost: the class made on the meta device, once for each trial.
    """
    old = config_of(model)
    always = _lists(old, sizes)
    for chosen in _choices(old, sizes):
        changed = {**always, **chosen}
        config = _changed(old, changed)
        try:
            made = _made(model, config)
        except Exception:  # whatever a class raises over numbers that do not go together
            continue
        if shapes_of(made) == shapes:
            yield Fit(changed, _refusal(config))


def no_config(model: nn.Module, sizes: Sizes, what: str, refusal: str | None) -> str:
    """The message where none do, or the class refuses those that would."""
    kind = type(config_of(model)).__name__
    reason, remedy = "has no entries that say the sizes that would be left", f"leave {what} at 0"
    if refusal is not None:
        reason, remedy = f"refuses what would be left: {refusal}", f"choose another share of {what}"
    elif not sizes.uniform:
        remedy = "use scope='layer', for one size in all layers"
    return (
        f"{what} cannot be removed from this {type(model).__name__}: its {kind} {reason}: {remedy}"
    )


def _refusal(config: Any) -> str | None:
    """Why a config's own checks would keep it from being saved or read, or None."""
    try:
        getattr(config, "validate", lambda: None)()
        type(config).from_dict(config.to_dict())
    except Exception as error:  # a class of huggingface_hub's, around what a check raised
        return " ".join(str(error.__cause__ or error).split()).rstrip(".")
    return None


def set_config_(model: nn.Module, changed: Mapping[Entry, Any]) -> dict[str, Any]:
    """Give the model and its modules a config of their own with these changes, and name them.

    Other models may have been made from the config that it had.
    """
    old = config_of(model)
    new = _changed(old, changed)
    instead = {id(part): _part(new, path) for path, part in _parts(old, ())}
    for module in model.modules():
        for key, value in vars(module).items():
            if id(value) in instead:
                vars(module)[key] = instead[id(value)]
    return {".".join((*path, key)): value for (path, key), value in changed.items()}


@torch.no_grad()
def as_made_anew_(model: nn.Module, batch: Batch, what: str) -> None:
    """Set the numbers that modules keep to those of the class made from the model's config.

    Cost: two runs of the batch.
    Raises:
        ValueError: if the model and the one made anew do not return the same for the batch.
    """
    stock = _filled(model, _made(model, copy.deepcopy(config_of(model))))
    for name, module in stock.named_modules():
        own = vars(model.get_submodule(name))
        for key, value in vars(module).items():
            if type(value) is int and type(own.get(key)) is int:
                own[key] = value
    with eval_mode(model, stock):
        ours, theirs = (tensors_of(answer(one, batch, "batch 0")) for one in (model, stock))
    for a, b in zip(ours, theirs, strict=True):
        if a.is_floating_point() and not torch.allclose(a, b, rtol=0, atol=_allowed(a)):
            raise ValueError(
                f"{what} cannot be removed from this {type(model).__name__}: made anew from its "
                f"smaller {type(config_of(model)).__name__} it computes something else: leave "
                f"{what} at 0"
            )


def _made(model: nn.Module, config: Any) -> nn.Module:
    """A new model of the class from this config, on the meta device."""
    kind: Any = type(model)
    with torch.device("meta"):
        made: nn.Module = kind(config)
    return made


def _changed(config: Any, changed: Mapping[Entry, Any]) -> Any:
    """A copy of the config with these changes."""
    config = copy.deepcopy(config)
    for (path, key), value in changed.items():
        vars(_part(config, path))[key] = value
    return config


def _filled(model: nn.Module, made: nn.Module) -> nn.Module:
    """The new model with the tensors of this one."""
    for name, module in made.named_modules():
        own = model.get_submodule(name)
        for key in module._parameters:
            module._parameters[key] = own._parameters[key]
        for key in module._buffers:
            module._buffers[key] = own._buffers[key]
    return made


def _allowed(x: Tensor) -> float:
    """How far two runs of the same products may differ: their order is the kernels' own."""
    return torch.finfo(x.dtype).eps ** 0.5 * float(x.abs().max()) if x.numel() else 0.0


# --- trials --------------------------------------------------------------------------------------


def _choices(config: Any, sizes: Sizes) -> Iterator[dict[Entry, Any]]:
    """Choices of entries with new values, fewest entries first; numbers before what is unset."""
    if not sizes.changes:
        yield {}
        return
    parts = list(_parts(config, ()))
    numbers = [
        ((path, key), after)
        for path, part in parts
        for key, value in vars(part).items()
        for before, after in sizes.changes
        if type(value) is int and value == before and key != HEAD_DIM
    ]
    unset = [
        ((path, key), after)
        for path, part in parts
        for key, value in vars(part).items()
        for _, after in sizes.changes
        if value is None and not key.startswith("_")
    ]
    several = [
        dict(chosen)
        for count in range(1, TOGETHER + 1)
        for chosen in itertools.combinations(numbers, count)
        if len(dict(chosen)) == count
    ]
    yield from several
    if widths := _widths(parts, sizes.head):
        yield from ({**widths, **chosen} for chosen in several)
    for entry, after in unset:
        yield {entry: after}


def _widths(parts: Iterable[tuple[tuple[str, ...], Any]], head: int | None) -> dict[Entry, int]:
    """The width of a head, in each part of the config that has none and has heads."""
    if head is None:
        return {}
    return {
        (path, HEAD_DIM): head
        for path, part in parts
        if hasattr(part, "num_attention_heads") and getattr(part, HEAD_DIM, None) is None
    }


def _lists(config: Any, sizes: Sizes) -> dict[Entry, list[Any]]:
    """The config's lists that have an element for each block, without those of blocks gone."""
    gone = set(sizes.gone)
    return {
        (path, key): [element for i, element in enumerate(value) if i not in gone]
        for path, part in _parts(config, ())
        for key, value in vars(part).items()
        if gone and isinstance(value, list) and len(value) == sizes.blocks
    }


def _parts(config: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The config and the configs in it, each with its path."""
    yield path, config
    for key, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _parts(value, (*path, key))


def _part(config: Any, path: Sequence[str]) -> Any:
    for key in path:
        config = getattr(config, key)
    return config
