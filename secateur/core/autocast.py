"""`torch.autocast` around a call: what it rounds to, and arithmetic that it leaves alone.

A model runs as its user has it run, under autocast too. Sums over its inputs, systems that are
solved and times that are measured are the library's own, and nothing is rounded there.
"""

import contextlib
from contextlib import AbstractContextManager

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast rounds to on this device; None outside of it."""
    if not torch.amp.autocast_mode.is_autocast_available(device.type):
        return None
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which nothing on this device is rounded by autocast."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
