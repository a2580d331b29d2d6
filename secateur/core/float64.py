"""Float64, which some devices lack (Apple's MPS): there it is computed on the CPU."""

import functools

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

CPU = torch.device("cpu")


def in_float64(x: Shaped[Tensor, "*size"]) -> Float64[Tensor, "*size"]:
    """`x` in float64: on its own device, or on the CPU if that has no float64."""
    return x.to(float64_device(x.device)).to(torch.float64)


def float64_device(device: torch.device) -> torch.device:
    """The device that computes float64 for this one: itself, or the CPU if it has no float64."""
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
