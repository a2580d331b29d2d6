"""Random scores: the baseline that every criterion has to beat."""

import torch
from jaxtyping import Float
from torch import Tensor


def random(weight: Float[Tensor, "out in"], layer_seed: int) -> Float[Tensor, "out in"]:
    """Uniform scores in [0, 1), the same for a layer of the same name in every run.

    Drawn on the CPU, so that a mask does not depend on the device.
    """
    generator = torch.Generator().manual_seed(layer_seed)
    return torch.rand(weight.shape, generator=generator, dtype=torch.float32, device="cpu").to(
        weight.device
    )
