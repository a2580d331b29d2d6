"""What every kernel for a GPU needs before anything else, in one sentence for all of them."""

import torch


def why_no_gpu(device: torch.device) -> str | None:
    """None for a CUDA device, else the reason, and what to do where something can be done.

    It names no kernel, so that a layer that several of them could run is told it once.
    """
    if device.type == "cuda":
        return None
    if not torch.cuda.is_available():
        return "running it packed needs a CUDA GPU, and this machine has none"
    return f"running it packed needs a CUDA GPU, the weight is on {device.type}: move it there"
