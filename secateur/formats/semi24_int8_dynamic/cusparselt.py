"""Products of int8 codes with a 2:4 weight on a GPU: cuSPARSELt between two Triton passes."""

from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats import dynamic
from secateur.formats.semi24_int8.packed import codes_of
from secateur.formats.semi24_int8_dynamic.packed import PackedSemi24Int8Dynamic


def why_not(packed: PackedSemi24Int8Dynamic, tokens: int) -> str | None:
    """None if the library can run this layer here, else the reason."""
    device = packed.values.device
    return dynamic.sparse_why_not(packed.shape, packed.dtype, torch.int8, device)


def arranged(
    packed: PackedSemi24Int8Dynamic,
) -> tuple[UInt8[Tensor, "..."], UInt8[Tensor, " bytes"]]:
    """The codes and the scales as the library reads them; made on load and never saved.

    Cost: see `dynamic.compressed`.
    """
    return dynamic.compressed(codes_of(packed)), dynamic.alpha_of(packed.scales)


def linear(
    x: Float[Tensor, "tokens in"],
    packed: PackedSemi24Int8Dynamic,
    bias: Float[Tensor, " out"] | None,
    blob: UInt8[Tensor, "..."],
    alpha: UInt8[Tensor, " bytes"],
) -> Float[Tensor, "tokens out"]:
    """The definition's result; for cost, error and what it raises see `dynamic.sparse_linear`."""
    codes = partial(codes_of, packed)
    return dynamic.sparse_linear(x, blob, alpha, packed.scales, bias, codes, torch.int8)
