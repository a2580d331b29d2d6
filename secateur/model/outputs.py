"""A model's output, logits or hidden states, and which of its positions count.

Every measure and every loss over outputs asks here, so that padding and the many forms of outputs
are handled in one place.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.graphs import is_captured
from secateur.core.interrupts import putting_back
from secateur.model.blocks import Batch, require_batch, run_batch, to_device, why_not
from secateur.model.padding import DECODER, has_decoder, tokens_kept


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Set eval mode without key-value caches or fused paths that skip modules; restore it after.

    Recurrent modules stay in training mode with a dropout of 0, which computes the same: cuDNN has
    gradients of them in that mode alone.
    """
    modules = [module for model in models for module in model.modules()]
    found: list[Any] = [getattr(module, "config", None) for module in modules]
    configs = {id(config): config for config in found if hasattr(config, "use_cache")}
    with putting_back() as stack:
        for module in modules:
            stack.callback(setattr, module, "training", module.training)
        for config in configs.values():
            stack.callback(setattr, config, "use_cache", config.use_cache)
        fastpath = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        for model in models:
            model.eval()
        for module in modules:
            if isinstance(module, nn.RNNBase):
                stack.callback(setattr, module, "dropout", module.dropout)
                module.dropout = 0.0
                module.train()
        for config in configs.values():
            config.use_cache = False
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def answer(model: nn.Module, batch: Batch, where: str) -> Any:
    """The model's output for the batch, which is moved to the model's device.

    Raises:
        ValueError: if the model cannot run it; `where` names the batch.
    """
    require_batch(batch, where)
    try:
        return run_batch(model, on_device(batch, model))
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(why_not(model, batch, where, error)) from error


def on_device(batch: Batch, model: nn.Module) -> Batch:
    """The batch with its tensors on the device of the model's first parameter."""
    moved: Batch = to_device(batch, device_of(model))
    return moved


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU for a model without parameters."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def logits_of(output: Any, where: str) -> Float[Tensor, "*positions classes"]:
    """The output's `logits`, or the output itself if it is a tensor.

    Raises:
        ValueError: if it is neither, or holds NaN (which is not looked for in a CUDA graph).
    """
    return _tensor_of(output, "logits", where)


def hidden_of(output: Any, where: str) -> Float[Tensor, "batch *tokens hidden"]:
    """The output's `last_hidden_state`, or the output itself if it is a tensor.

    Raises:
        ValueError: if it is neither, or holds NaN.
    """
    return _tensor_of(output, "last_hidden_state", where)


def counted(
    batch: Batch, output: Any, positions: torch.Size, device: torch.device
) -> Bool[Tensor, "..."]:
    """True at the output's positions that are not padding, as far as the batch tells.

    The output of a decoder after an encoder follows `decoder_attention_mask`, else the labels:
    nothing counts after the last one that is not -100. Other models' outputs follow
    `attention_mask`. All positions count if there is no mask, or if the output does not have one
    position per token; in the second case, if there is padding, with a warning.
    """
    everywhere = torch.ones(positions, dtype=torch.bool, device=device)
    if not isinstance(batch, Mapping) or len(positions) != 2:
        return everywhere
    decodes = has_decoder(batch) or getattr(output, "encoder_last_hidden_state", None) is not None
    mask = tokens_kept(batch, decodes).get(DECODER if decodes else "")
    if mask is None or mask.shape == positions:
        return everywhere if mask is None else mask.to(device)
    if not bool(mask.all()):
        warnings.warn(
            f"the output has positions {tuple(positions)} and attention_mask {tuple(mask.shape)}: "
            "which of them are padding cannot be known, and all count: give rows without padding",
            stacklevel=3,
        )
    return everywhere


def divergence(
    dense: Float[Tensor, "*positions classes"], logits: Float[Tensor, "*positions classes"]
) -> Float[Tensor, "*positions"]:
    """KL(dense || model) = sum_c p_c (log p_c - log q_c) in nats, 0 for classes that p excludes.

    Computed in float32 at least.
    """
    dtype = torch.promote_types(dense.dtype, torch.float32)
    p, q = F.log_softmax(dense.to(dtype), dim=-1), F.log_softmax(logits.to(dtype), dim=-1)
    probabilities = p.exp()
    return (probabilities * (p - q)).masked_fill(probabilities == 0, 0).sum(-1)


def pooled(
    hidden: Float[Tensor, "batch *tokens hidden"], mask: Bool[Tensor, "..."]
) -> Float[Tensor, "batch hidden"]:
    """The mean over the counted tokens, scaled to length 1; a single vector is its own mean."""
    if hidden.dim() == 3:
        weights = mask[..., None].float()
        hidden = (hidden.float() * weights).sum(1) / weights.sum(1)
    return F.normalize(hidden.float(), dim=-1)


def _tensor_of(output: Any, name: str, where: str) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, name, None)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        kind = f"{found.dtype} numbers" if isinstance(found, Tensor) else type(output).__name__
        raise ValueError(
            f"the output needs to be a float tensor or to have .{name}, got {kind} for {where}: "
            "wrap the model so that it returns the tensor"
        )
    if not is_captured(found.device) and bool(found.isnan().any()):
        raise ValueError(
            f"{name} need to be numbers, {where} gave {int(found.isnan().sum())} NaN of "
            f"{found.numel()}: check the weights, and the data of that batch"
        )
    return found
