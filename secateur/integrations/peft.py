"""PEFT's adapters merged into weights with zeros: what they add, without what would fill the zeros.

PEFT's own merge fills them, and has no place to say that it may not.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from secateur.core.shown import Shown, Table
from secateur.core.undo import Undo, all_or_nothing
from secateur.core.weights import require_module, require_ordinary, tied_weights
from secateur.core.wrappers import base_name, unwrapped

# Adapters merged one after another add up to this share of what they add, or they do not add up.
ADD_UP = 1e-3


@dataclass(frozen=True)
class MergedWeight:
    """A weight that adapters were merged into; norms are Frobenius norms."""

    weight: str
    zeros: float  # its share of zeros
    added: float  # norm of what the adapters would add
    dropped: float  # norm of the part of it that lies on zeros

    @property
    def cost(self) -> float:
        """What the mask dropped, as a share of what the adapters would add."""
        return self.dropped / self.added if self.added else 0.0


@dataclass(frozen=True)
class MergeReport(Shown):
    """What `merge_adapters_` merged, and what keeping the zeros cost."""

    adapters: Mapping[str, float]
    weights: tuple[MergedWeight, ...]

    @property
    def cost(self) -> float:
        """What the masks dropped of all weights together, as a share of what adapters would add."""
        added = math.hypot(*(w.added for w in self.weights))
        return math.hypot(*(w.dropped for w in self.weights)) / added if added else 0.0

    @property
    def columns(self) -> tuple[str, ...]:
        return ("weight", "zeros", "norm added", "dropped")

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (w.weight, f"{w.zeros:.1%}", f"{w.added:.4g}", f"{w.cost:.1%}") for w in self.weights
        ]

    @property
    def paragraphs(self) -> tuple[str | Table, ...]:
        return (
            Table(self.columns, self.rows()),
            f"zeros kept in {len(self.weights)} weights; "
            f"of what the adapters add, their masks dropped {self.cost:.1%} (Frobenius norm)",
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "cost": self.cost}


@torch.inference_mode(False)
@torch.no_grad()
def merge_adapters_(
    model: nn.Module, adapters: str | Sequence[str] | Mapping[str, float] | None = None
) -> MergeReport:
    """Merge PEFT's adapters into the model's weights, every zero of which stays zero.

    What PEFT's own merge of an adapter would add to a weight is added where the weight is not zero;
    the report says how much that left out. So the merged model computes what the adapted one did
    but for that. `adapters` are the active ones by default, and a mapping from names to factors
    for a weighted sum. Copies in `modules_to_save` keep the zeros of what they replace. Afterwards
    the model inside, `model.get_base_model()`, is a plain one, as after `merge_and_unload`.

    Cost: a layer's weight in float32, three times; a copy of all changed weights on the disk.
    Raises:
        ValueError: if the model is none of PEFT's, an adapter is missing, merged already or of a
            method that cannot be merged, several do not add up, or a weight is packed, tied,
            quantised or becomes infinite. Whatever is raised, the model is left as it was.
    """
    require_module(model)
    with all_or_nothing() as undo:
        return _merge(unwrapped(model), adapters, undo)


def _merge(
    model: nn.Module, adapters: str | Sequence[str] | Mapping[str, float] | None, undo: Undo
) -> MergeReport:
    tuner = _tuner(model)
    factors = _factors(model, adapters)
    names = {module: base_name(model, name) for name, module in model.named_modules()}
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    copies = [m for m in model.modules() if _has_copy(m, factors)]
    _require_mergeable(model, layers, names)
    _require_active(copies, factors, names)
    undo.call(_put_modules, {module: dict(module._modules) for module in model.modules()})
    merged: list[MergedWeight] = []
    for layer in layers:
        base = layer.get_base_layer()
        merged += _merge_layer(layer, names[base] or "", factors, undo)
    for wrapper in copies:
        merged += _mask_copy(
            wrapper, names[wrapper.original_module] or "", next(iter(factors)), undo
        )
    inside = model.get_base_model()  # type: ignore[operator]
    if "peft_config" in vars(inside):
        undo.call(setattr, inside, "peft_config", inside.peft_config)
    tuner.unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in inside.modules())
    return MergeReport(factors, tuple(merged))


# --- what can be merged --------------------------------------------------------------------------


def _tuner(model: nn.Module) -> Any:
    """PEFT's object that can take the adapters off again."""
    if not isinstance(model, peft.PeftModel):
        inside = any(isinstance(module, BaseTunerLayer) for module in model.modules())
        remedy = (
            "write the adapter with model.save_pretrained(folder), load the model without it, and "
            "put it around with peft.PeftModel.from_pretrained(model, folder)"
            if inside
            else "put an adapter around it with peft.PeftModel.from_pretrained(model, folder)"
        )
        raise ValueError(
            f"merge_adapters_ needs a peft.PeftModel, got {type(model).__name__}: {remedy}"
        )
    tuner: Any = model.base_model
    layers = any(isinstance(module, BaseTunerLayer) for module in tuner.modules())
    # X-LoRA holds another tuner instead of the model: its factors depend on the input.
    if not isinstance(tuner, BaseTuner) or "model" not in tuner._modules or not layers:
        kinds = ", ".join(sorted({str(c.peft_type.value) for c in model.peft_config.values()}))
        raise ValueError(
            f"adapters of {kinds} are no change of weights and cannot be merged: keep them beside "
            "the model"
        )
    return tuner


def _factors(
    model: Any, adapters: str | Sequence[str] | Mapping[str, float] | None
) -> dict[str, float]:
    """The adapters to merge, each with its factor."""
    chosen = model.base_model.active_adapters if adapters is None else adapters
    chosen = [chosen] if isinstance(chosen, str) else chosen
    factors = dict(chosen) if isinstance(chosen, Mapping) else dict.fromkeys(chosen, 1.0)
    known = ", ".join(model.peft_config)
    if not factors:
        raise ValueError(f"merge_adapters_ needs an adapter, got none: name one of {known}")
    for name, factor in factors.items():
        if name not in model.peft_config:
            raise ValueError(f"the model has no adapter {name!r}: name one of {known}")
        if not math.isfinite(factor):
            raise ValueError(f"adapter {name!r} needs a finite factor, got {factor}: pass a number")
    return {name: float(factor) for name, factor in factors.items()}


def _require_mergeable(
    model: nn.Module, layers: Sequence[Any], names: Mapping[nn.Module, str | None]
) -> None:
    """Raise unless every adapted layer has weights of its own that can be added to."""
    tied = tied_weights(model)
    tied_to = {m: base_name(model, tied[n]) for n, m in model.named_modules() if n in tied}
    for layer in layers:
        base = layer.get_base_layer()
        name = names[base] or ""
        if isinstance(base, nn.MultiheadAttention):
            raise ValueError(f"{name} is nn.MultiheadAttention: keep its adapter beside the model")
        if "weight" in base._parameters or hasattr(base, "packed"):
            require_ordinary({name: base})
        if base in tied_to:
            raise ValueError(
                f"{name}.weight is tied to {tied_to[base]}, which would change with it: untie them "
                "first, layer.weight = torch.nn.Parameter(layer.weight.detach().clone())"
            )
        if layer.merged:
            raise ValueError(f"{name} has {layer.merged_adapters} merged: call unmerge_adapter()")


def _has_copy(module: nn.Module, factors: Mapping[str, float]) -> bool:
    return isinstance(module, ModulesToSaveWrapper) and any(
        name in module.modules_to_save for name in factors
    )


def _require_active(
    copies: Sequence[Any], factors: Mapping[str, float], names: Mapping[nn.Module, str | None]
) -> None:
    """Raise unless the copies in `modules_to_save` are the ones that run, and as they are."""
    for wrapper in copies:
        name = names[wrapper.original_module]
        if list(factors.values()) != [1.0]:
            raise ValueError(
                f"{name} is copied by an adapter (modules_to_save), and copies have no weighted "
                "sum: merge one adapter with the factor 1"
            )
        if wrapper.active_adapters != list(factors):
            raise ValueError(
                f"{name} runs the copy of {wrapper.active_adapters}: call "
                f"model.set_adapter({next(iter(factors))!r}) first"
            )


# --- one layer -----------------------------------------------------------------------------------


def _merge_layer(
    layer: Any, name: str, factors: Mapping[str, float], undo: Undo
) -> Iterator[MergedWeight]:
    """Add what the adapters add to the parameters of a layer, and say what of it was dropped."""
    base = layer.get_base_layer()
    own = dict(base.named_parameters())
    data = {key: parameter.data for key, parameter in own.items()}
    undo.remember(data)
    undo.call(_put_data, own, data)
    undo.call(setattr, layer, "merged_adapters", list(layer.merged_adapters))
    start = {key: _wide(tensor) for key, tensor in data.items()}
    one_by_one = {a: _added(layer, name, own, start, [a]) for a in factors}
    if len(factors) > 1:
        together = _added(layer, name, own, start, list(factors))
        for key in own:
            total = sum((added[key] for added in one_by_one.values()), torch.zeros_like(start[key]))
            if (together[key] - total).norm() > ADD_UP * total.norm():
                raise ValueError(
                    f"adapters {', '.join(factors)} do not add up in {name}.{key}, each changes "
                    "what the other does: merge one"
                )
    for key in own:
        parts = [factor * one_by_one[a][key] for a, factor in factors.items()]
        own[key].data = data[key]
        what = name if key == "weight" else f"{name}.{key}"
        yield from _put(what, data[key], start[key], sum(parts, torch.zeros_like(parts[0])))


def _added(
    layer: Any,
    name: str,
    own: Mapping[str, nn.Parameter],
    start: Mapping[str, Tensor],
    adapters: list[str],
) -> dict[str, Tensor]:
    """What PEFT's merge of these adapters adds to each parameter, the layer left as it was."""
    modules = {module: dict(module._modules) for module in layer.modules()}
    _put_data(own, {key: tensor.clone() for key, tensor in start.items()})
    try:
        layer.merge(safe_merge=True, adapter_names=adapters)
        merged = dict(layer.get_base_layer().named_parameters())
        return {key: merged[key].detach().to(start[key]) - start[key] for key in own}
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        why = str(e).partition("\n")[0] or type(e).__name__
        raise ValueError(
            f"PEFT cannot merge {', '.join(adapters)} into {name} ({why}): keep the adapter beside "
            "the model"
        ) from e
    finally:
        _put_modules(modules)
        _put_data(own, start)
        layer.merged_adapters = []


def _mask_copy(wrapper: Any, name: str, adapter: str, undo: Undo) -> Iterator[MergedWeight]:
    """Set the copy that replaces a module to zero where the module's weights are zero."""
    copied = dict(wrapper.modules_to_save[adapter].named_parameters())
    undo.remember(copied)
    for key, original in wrapper.original_module.named_parameters():
        start = _wide(original.data)
        what = name if key == "weight" else f"{name}.{key}"
        yield from _put(what, copied[key].data, start, copied[key].data.to(start) - start)


def _put(what: str, data: Tensor, start: Tensor, added: Tensor) -> Iterator[MergedWeight]:
    """Write `start + added` where `start` is not zero; vectors, which nothing prunes, in full."""
    kept = (start != 0) | torch.tensor(start.dim() < 2, device=start.device)
    data.copy_(torch.where(kept, start + added, 0))
    if not data.isfinite().all():
        raise ValueError(f"{what} would become NaN or infinite: repair the adapter or scale it")
    if start.dim() >= 2:
        zeros = float((~kept).float().mean())
        yield MergedWeight(what, zeros, float(added.norm()), float(added[~kept].norm()))


def _wide(tensor: Tensor) -> Tensor:
    """A copy in at least float32, in which sums are not rounded twice."""
    return tensor.detach().clone().to(torch.promote_types(tensor.dtype, torch.float32))


def _put_data(parameters: Mapping[str, nn.Parameter], data: Mapping[str, Tensor]) -> None:
    for key, parameter in parameters.items():
        parameter.data = data[key]


def _put_modules(modules: Mapping[nn.Module, Mapping[str, nn.Module | None]]) -> None:
    for module, children in modules.items():
        module._modules.clear()
        module._modules.update(children)
