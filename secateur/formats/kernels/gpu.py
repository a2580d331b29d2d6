"""What every kernel for a GPU needs before anything else, in one sentence for all of them."""

import torch


def why_no_gpu(device: torch.device) -> str | None:
    """Why this is no CUDA device, and what to do if something can be done, or None.

    It names no kernel, so that a layer that several of them could run reports it once.
    """
    if device.type == "cuda":
        return None
    if not torch.cuda.is_available():
        return "running it packed needs a CUDA GPU, and this machine has none"
    return f"running it packed needs a CUDA GPU, the weight is on {device.type}: move it there"
