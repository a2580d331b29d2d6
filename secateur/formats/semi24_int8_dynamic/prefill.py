"""2:4 weights of 8-bit integers at many tokens on Hopper: one pass rounds, one multiplies."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats.kernels import prefill24
from secateur.formats.semi24_int8_dynamic.packed import PackedSemi24Int8Dynamic


def why_not(packed: PackedSemi24Int8Dynamic, tokens: int) -> str | None:
    """None if the kernel can run this layer here, else the reason."""
    return prefill24.why_not(packed.shape, packed.dtype, packed.values.device)


def arranged(packed: PackedSemi24Int8Dynamic) -> tuple[UInt8[Tensor, "tiles blocks tile_bytes"]]:
    """Codes and metadata in the order that the kernel's lanes read them."""
    return (prefill24.arrange(packed.values, packed.metadata),)


def linear(
    x: Float[Tensor, "tokens in"],
    packed: PackedSemi24Int8Dynamic,
    bias: Float[Tensor, " out"] | None,
    tiles: UInt8[Tensor, "tiles blocks tile_bytes"],
    activation: str = "",
) -> Float[Tensor, "tokens out"]:
    """The definition's result; for cost, error and what it raises see `prefill24.linear`."""
    return prefill24.linear(x, tiles, packed.scales, bias, torch.int8, activation)
