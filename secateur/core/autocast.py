"""`torch.autocast` around a call: the dtype it rounds to, and blocks in which it is off.

A model runs as its user runs it, under autocast too. Sums over its inputs, linear solves and
timings are the library's own, and autocast rounds nothing there.
"""

import contextlib
from contextlib import AbstractContextManager

import torch

# Not asked for: torch 2.11 cannot compile the question as a part of one graph.
HAVE_AUTOCAST = ("cpu", "cuda")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast rounds to on this device; None where autocast is off."""
    if device.type not in HAVE_AUTOCAST:
        if not torch.amp.autocast_mode.is_autocast_available(device.type):
            return None
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast rounds nothing on this device."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
