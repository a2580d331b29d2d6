"""Wrappers around a whole model: what they wrap, and the names of its parts without them.

`torch.compile` and torch's data-parallel modules hold the model as a child, so that names begin
with `_orig_mod.` or `module.`; a plan, a file or a report is about the model inside.
"""

import sys

import torch
from torch import nn

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`, or itself.

    It is the same object, not a copy: a change to it changes the wrapped model.
    """
    while child := wrapping(model):
        model = model.get_submodule(child)
    return model


def optimizer_with_hooks(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that calls step hooks: this one, or the one that it wraps.

    The `accelerate` package's wrapper, which HF's Trainer hands to callbacks, has it as
    `.optimizer`.
    """
    while not hasattr(optimizer, "_optimizer_step_post_hooks"):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} calls no hooks at its steps: pass the "
                "torch.optim.Optimizer that it wraps"
            )
        optimizer = inner
    return optimizer


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

    `layers.0.base_layer.weight` is `layers.0.weight`.
    """
    kept: list[str] = []
    module: nn.Module | None = model
    for part in name.split("."):
        inner = "" if module is None else wrapping(module)
        if module is not None and not inner and (inner := _under_adapter(module)):
            if part != inner:
                return None
        if part != inner:
            kept.append(part)
        child = getattr(module, part, None)  # asked for as such: a ScriptModule has no dict of them
        module = child if isinstance(child, nn.Module) else None
    return ".".join(kept)


def _under_adapter(module: nn.Module) -> str:
    """The name of the child that a PEFT layer adapts; empty for other modules."""
    if not isinstance(getattr(module, "adapter_layer_names", None), tuple | list):
        return ""
    return next((n for n in ("base_layer", "original_module") if n in module._modules), "")


def wrapping(module: nn.Module) -> str:
    """The name of the child that the module wraps; empty if it is no wrapper."""
    if isinstance(module, PARALLEL):
        return "module"
    # Looked up without an import, which costs seconds: no model is compiled before it is loaded.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if dynamo and isinstance(module, dynamo.OptimizedModule) else ""
