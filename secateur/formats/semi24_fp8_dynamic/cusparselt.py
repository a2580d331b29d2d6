"""Products of fp8 codes with a 2:4 weight on a GPU: cuSPARSELt between two Triton passes."""

from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from secateur.formats import dynamic
from secateur.formats.semi24_fp8.packed import codes_of
from secateur.formats.semi24_fp8_dynamic.packed import PackedSemi24Fp8Dynamic


def why_not(packed: PackedSemi24Fp8Dynamic, tokens: int) -> str | None:
    """None if the library can run this layer here, else the reason."""
    device = packed.values.device
    return dynamic.sparse_why_not(packed.shape, packed.dtype, torch.float8_e4m3fn, device)


def arranged(packed: PackedSemi24Fp8Dynamic) -> tuple[UInt8[Tensor, "..."]]:
    """The codes as the library reads them; made on load and never saved.

    Cost: see `dynamic.compressed`.
    """
    return (dynamic.compressed(codes_of(packed)),)


def linear(
    x: Float[Tensor, "tokens in"],
    packed: PackedSemi24Fp8Dynamic,
    bias: Float[Tensor, " out"] | None,
    blob: UInt8[Tensor, "..."],
) -> Float[Tensor, "tokens out"]:
    """The definition's result; for cost, error and what it raises see `dynamic.sparse_linear`."""
    codes = partial(codes_of, packed)
    return dynamic.sparse_linear(x, blob, None, packed.scales, bias, codes, torch.float8_e4m3fn)
