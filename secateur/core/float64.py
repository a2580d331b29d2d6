"""Float64, which some devices lack (Apple's MPS): what needs it is computed on the CPU then."""

import functools

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

CPU = torch.device("cpu")


def in_float64(x: Shaped[Tensor, "*size"]) -> Float64[Tensor, "*size"]:
    """X in float64: where it is, or on the CPU if its device has none."""
    return x.to(float64_device(x.device)).to(torch.float64)


def float64_device(device: torch.device) -> torch.device:
    """Where float64 is computed for tensors of this device: there, or on the CPU if it has none."""
    return device if _has_float64(device) else CPU


@functools.cache
def _has_float64(device: torch.device) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return True
