"""Wrappers around a whole model: what they wrap, and the names that its parts have without them.

`torch.compile` and the data-parallel modules of torch hold a model as a child of their own, so that
names begin with `_orig_mod.` or `module.`; a plan, a file or a report is about the model inside.
"""

import sys

import torch
from torch import nn

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of `torch.compile`, `DataParallel` and `DistributedDataParallel`, or itself.

    It is the same object, not a copy: what is changed in it is changed in the wrapped model.
    """
    while child := wrapping(model):
        model = model.get_submodule(child)
    return model


def stepping(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that calls hooks at its steps: what one without hooks of its own wraps.

    accelerate's, which HF's Trainer hands to callbacks, has it as `.optimizer`.
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
    """The name that a module or tensor of the model has where neither it nor a part is wrapped.

    `_orig_mod.layers.0._orig_mod.weight` is `layers.0.weight`. A name that the model lacks comes
    back as it is.
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
    """The model that PEFT has put adapters around, without PEFT's own modules, or itself."""
    peft = sys.modules.get("peft.peft_model")
    if not (peft and isinstance(model, peft.PeftModel)):
        return model
    base: nn.Module = model.get_base_model()
    return base


def base_name(model: nn.Module, name: str) -> str | None:
    """As `unwrapped_name`, and as if there were no adapters; None for what belongs to an adapter.

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
    """The name of the child that one of PEFT's layers adapts; empty for other modules."""
    if not isinstance(getattr(module, "adapter_layer_names", None), tuple | list):
        return ""
    return next((n for n in ("base_layer", "original_module") if n in module._modules), "")


def wrapping(module: nn.Module) -> str:
    """The name of the child that the module only wraps; empty for a module of any other kind."""
    if isinstance(module, PARALLEL):
        return "module"
    # Asked for without an import, which costs seconds: a model is compiled only once it is there.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if dynamo and isinstance(module, dynamo.OptimizedModule) else ""
