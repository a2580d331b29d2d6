"""Wrappers around a whole model: what they wrap, and the names of its parts without them.

`torch.compile` and torch's data-parallel modules hold the model as a child, so that names begin
with `_orig_mod.` or `module.`; a plan, a file or a report is about the model inside.
"""

import sys
from collections.abc import Sequence

import torch
from torch import nn

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
# What PEFT's modules call the module that they adapt: layers, copies of layers, whole models.
ADAPTED = ("base_layer", "original_module", "base_model", "lora_model", "model")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, or itself.

    It is the same object, not a copy: a change to it changes the wrapped model.
    """
    while child := wrapping(model):
        model = model.get_submodule(child)
    return model


def optimizers_with_hooks(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that call step hooks: this one and all that it hands steps on to, in order.

    What wraps an optimizer keeps it as an attribute, whatever that is called: `.optimizer` for the
    `accelerate` package, whose wrapper calls no hooks itself and is what HF's Trainer hands to
    callbacks, `.base_optimizer` for SAM, `.optim` for ZeRO.

    Raises: ValueError if none of them calls hooks.
    """
    found = [one for one in _handed_on(optimizer) if hasattr(one, "_optimizer_step_post_hooks")]
    if not found:
        raise ValueError(
            f"{type(optimizer).__name__} calls no hooks at its steps: pass the "
            "torch.optim.Optimizer that it wraps"
        )
    return found


def _handed_on(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizer, and those that it or one of them has as an attribute, alone or in a list."""
    found = [optimizer]
    for one in found:
        for value in vars(one).values():
            several = value.values() if isinstance(value, dict) else value
            for other in several if isinstance(value, (list, tuple, dict)) else [value]:
                known = not isinstance(other, torch.optim.Optimizer) or any(
                    other is each for each in found
                )
                found += [] if known else [other]
    return found


# What makes flat vectors of parameters, in which no weight has a shape, and what to use instead.
FLATTENING = {
    (
        "torch",
        "FullyShardedDataParallel",
    ): "FSDP1: shard with fully_shard (FSDP2), which keeps them",
    ("fairscale", "FullyShardedDataParallel"): "FSDP: shard with torch's fully_shard (FSDP2)",
    ("deepspeed", ""): "DeepSpeed: train with fully_shard (FSDP2) or DistributedDataParallel",
    ("accelerate", "DeepSpeedOptimizerWrapper"): "DeepSpeed: use accelerate with FSDP2 or DDP",
}


def require_unflattened(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise if the model or an optimizer belongs to a trainer that flattens parameters.

    Raises:
        ValueError: with its name and what to use instead.
    """
    parts = [*model.modules(), *(one for outer in optimizers for one in _handed_on(outer))]
    for kind in dict.fromkeys(type(part) for part in parts):
        for base in kind.__mro__:
            for (package, name), remedy in FLATTENING.items():
                if base.__module__.partition(".")[0] == package and name in ("", base.__name__):
                    raise ValueError(
                        f"zeros cannot be held in parameters that are flattened, {kind.__name__} "
                        f"is of {remedy}"
                    )


def unwrapped_name(model: nn.Module, name: str) -> str:
    """The name of a module or tensor of the model without the wrappers around it and its parts.

    `_orig_mod.layers.0._orig_mod.weight` is `layers.0.weight`. A name that the model lacks is
    returned unchanged.
    """
    kept: list[str] = []
    module: nn.Module | None = model
    for part in name.split("."):
        if module is None or part != wrapping(module):
            kept.append(part)
        child = getattr(module, part, None)  # asked for as such: a ScriptModule has no dict of them
        module = child if isinstance(child, nn.Module) else None
    return ".".join(kept)


def adapted(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, whose layers still hold their adapters; or itself."""
    peft = sys.modules.get("peft.peft_model")
    if not (peft and isinstance(model, peft.PeftModel)):
        return model
    base: nn.Module = model.get_base_model()
    return base


def base_name(model: nn.Module, name: str) -> str | None:
    """The name without wrappers and without adapters; None for what belongs to an adapter.

    `base_model.model.layers.0.base_layer.weight` is `layers.0.weight`.
    """
    kept: list[str] = []
    module: nn.Module | None = model
    for part in name.split("."):
        inner: str | None = None if module is None else wrapping(module) or None
        if module is not None and inner is None:
            inner = under_adapter(module)
            if inner is not None and part != inner:
                return None
        if part != inner:
            kept.append(part)
        child = getattr(module, part, None)  # asked for as such: a ScriptModule has no dict of them
        module = child if isinstance(child, nn.Module) else None
    return ".".join(kept)


def under_adapter(module: nn.Module) -> str | None:
    """The name of the child that PEFT's module adapts; None if it is not PEFT's.

    All else in such a module is the adapter's, whatever the method; with "" all of it is.
    """
    marked = isinstance(getattr(module, "adapter_layer_names", None), tuple | list)
    if not marked and not any(
        c.__module__.partition(".")[0] == "peft" for c in type(module).__mro__
    ):
        return None
    return next((name for name in ADAPTED if name in module._modules), "")


def wrapping(module: nn.Module) -> str:
    """The name of the child that the module wraps; empty if it is no wrapper."""
    if isinstance(module, PARALLEL):
        return "module"
    # Looked up without an import, which costs seconds: no model is compiled before it is loaded.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if dynamo and isinstance(module, dynamo.OptimizedModule) else ""
