"""What every kernel for a GPU needs before anything else, in one sentence for all of them."""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor


def why_no_gpu(device: torch.device) -> str | None:
    """Why this is no CUDA device, and what to do if something can be done, or None.

    It names no kernel, so that a layer that several of them could run reports it once.
    """
    if device.type == "cuda":
        return None
    if not torch.cuda.is_available():
        return "running it packed needs a CUDA GPU, and this machine has none"
    return f"running it packed needs a CUDA GPU, the weight is on {device.type}: move it there"


def why_not_16_bits(kernel: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a kernel for 16-bit floats on a GPU, called this in messages, cannot run, or None."""
    if (problem := why_no_gpu(device)) is not None:
        return problem
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{kernel} needs bfloat16 or float16, got {dtype}: cast the layer"
    return None


def why_no_multiple(what: str, shape: tuple[int, int], step: int) -> str | None:
    """Why a weight of this shape is not whole steps along both sides, or None."""
    rows, columns = shape
    if rows % step or columns % step or not rows or not columns:
        return (
            f"{what} needs out_features and in_features that are multiples of {step}, "
            f"got {rows} x {columns}: pad the layer with zeros"
        )
    return None


def why_not_capability(
    what: str, device: torch.device, needed: tuple[int, int], remedy: str, alone: bool = False
) -> str | None:
    """Why this GPU is older than what is needed, or with `alone` of another generation, or None."""
    has = torch.cuda.get_device_capability(device)
    if has == needed or (has > needed and not alone):
        return None
    return (
        f"{what} needs compute capability {needed[0]}.{needed[1]}, this GPU has {has[0]}.{has[1]}: "
        f"{remedy}"
    )


def why_no_bindings(kernel: str) -> str | None:
    """Why the driver cannot be called to launch the kernel, or None if cuda-bindings is there."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return f"{kernel} needs cuda-bindings: pip install 'secateur[cuda]'"
    return None


def check_bias(kernel: str, bias: Tensor | None, dtype: torch.dtype) -> None:
    """Raise unless the bias has the input's dtype.

    Raises: ValueError for another one.
    """
    if bias is not None and bias.dtype != dtype:
        raise ValueError(
            f"{kernel} needs a bias of the input's {dtype}, got {bias.dtype}: "
            "cast the whole layer with .to"
        )


def on(device: torch.device) -> AbstractContextManager[object]:
    """The context in which the device is the current one; most calls have nothing to do for it."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
