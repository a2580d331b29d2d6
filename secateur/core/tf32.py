"""Products of float32 matrices in TF32, where tensor cores make them several times as fast."""

import contextlib
from collections.abc import Iterator

import torch

from secateur.core.interrupts import putting_back


@contextlib.contextmanager
def in_tf32(device: torch.device) -> Iterator[None]:
    """Let a GPU round the factors of float32 products to 10 bits inside the block; sums stay.

    For training alone, whose gradients vary far more from batch to batch: solvers need all bits.
    """
    if device.type != "cuda":
        yield
        return
    with putting_back() as stack:
        own = torch.backends.cuda.matmul
        stack.callback(setattr, own, "fp32_precision", own.fp32_precision)
        own.fp32_precision = "tf32"
        yield
