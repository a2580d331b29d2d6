"""What a decode step of a language model runs between its linear layers, as kernels.

Each function binds a launch to tensors that keep their addresses: `Bound` launches it on a stream,
and can be captured in a CUDA graph. Launches follow one another by programmatic dependent launch.
"""

from secateur.formats.kernels.decode_step.append import append
from secateur.formats.kernels.decode_step.attention import Attention, attention, why_no_attention
from secateur.formats.kernels.decode_step.between import (
    ACTIVATIONS,
    Bound,
    add_norm,
    choose,
    embed,
    gated,
    norm,
)

__all__ = [
    "ACTIVATIONS",
    "Attention",
    "Bound",
    "add_norm",
    "append",
    "attention",
    "choose",
    "embed",
    "gated",
    "norm",
    "why_no_attention",
]
