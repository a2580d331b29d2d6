"""Weights on a GPU: one arrangement of a weight, the units, and what multiplies by it.

Shared by `semi24`, `semi48`, their quantised forms, and `int4` and `int8` without zeros. A layer
holds its weight once, whatever the number of tokens: few are served by `decode`, more of 2:4 by
`prefill` on Hopper, and any number by `expand`, which makes the dense weight for one call.
"""

from collections.abc import Callable

from jaxtyping import Float, Shaped
from torch import Tensor

from secateur.formats.contract import Arrangement, Implementation, Packed
from secateur.formats.kernels import decode24, prefill16
from secateur.formats.kernels.decode24 import Kind, expand

Codes = Callable[[Packed], Shaped[Tensor, "out kept"]]
Values = Callable[[Tensor], Tensor]


def decode(kind: Kind, grouped: bool, codes: Codes, values: Values) -> Implementation:
    """1 to 64 tokens: the tensor cores, the sparse ones for 2:4, fed by a stream of weights.

    `codes(packed)` are the kept numbers as `decode24.arrange` takes them, and `values(codes)` what
    is stored of them; `grouped` is whether each group of 128 inputs has a scale.
    """
    run, units = _through(decode24.multiply, kind, grouped), _units(kind, grouped, codes, values)
    return Implementation("decode", run, _why_not_decode, units)


def prefill(kind: Kind, grouped: bool, codes: Codes, values: Values) -> Implementation:
    """Any number of tokens on Hopper, for 2:4. The arguments are `decode`'s."""
    run, units = _through(prefill16.multiply, kind, grouped), _units(kind, grouped, codes, values)
    return Implementation("prefill", run, _why_not_prefill, units, prefill16.ACTIVATIONS)


def expanded(kind: Kind, grouped: bool, codes: Codes, values: Values) -> Implementation:
    """Any number of tokens, by cuBLAS on a dense weight that is made for each call."""
    run = _through(expand.multiply_expanded, kind, grouped)
    return Implementation("expand", run, _why_not_expand, _units(kind, grouped, codes, values))


def _units(kind: Kind, grouped: bool, codes: Codes, values: Values) -> Arrangement:
    """Codes, metadata and the groups' scales as the kernels' lanes read them, in one tensor.

    Scales of whole rows stay as they are stored, beside it.
    """
    beside = () if grouped or kind.numbers is Kind.W16 else ("scales",)

    def arrange(packed: Packed) -> dict[str, Tensor]:
        scales = packed["scales"] if grouped else None
        metadata = packed.tensors.get("metadata")
        return {"units": decode24.arrange(kind, codes(packed), metadata, scales, packed.dtype)}

    def restore(packed: Packed) -> dict[str, Tensor]:
        columns, units = packed.shape[1], packed["units"]
        kept, metadata, scales = decode24.restore(kind, units, grouped, columns, packed.dtype)
        of_rows = {name: packed[name] for name in beside}
        made = {"values": values(kept), "metadata": metadata, "scales": scales, **of_rows}
        return {name: tensor for name, tensor in made.items() if tensor is not None}

    return Arrangement(("units", *beside), arrange, restore)


def _through(multiply: Callable[..., Tensor], kind: Kind, grouped: bool) -> Callable[..., Tensor]:
    """The linear that multiplies by units so."""

    def linear(
        x: Float[Tensor, "tokens in"],
        packed: Packed,
        bias: Float[Tensor, " out"] | None,
        activation: str = "",
    ) -> Float[Tensor, "tokens out"]:
        scales, rows = packed.tensors.get("scales"), packed.shape[0]
        options = (activation,) if activation else ()
        return multiply(x, packed["units"], scales, bias, kind, grouped, rows, *options)

    return linear


def _why_not_decode(packed: Packed, tokens: int) -> str | None:
    return decode24.why_not(packed.shape, packed.dtype, packed.device, tokens)


def _why_not_prefill(packed: Packed, tokens: int) -> str | None:
    return prefill16.why_not(packed.shape, packed.dtype, packed.device)


def _why_not_expand(packed: Packed, tokens: int) -> str | None:
    return expand.why_not(packed.shape, packed.dtype, packed.device)
