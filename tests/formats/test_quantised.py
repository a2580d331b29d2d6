"""Values of `Quantised` without zeros or a name: stored, described and multiplied rightly."""

import pytest
import torch

import secateur as sc
from secateur.formats import SparseLinear, describe, empty_from, parse_format
from secateur.formats.format import FORMATS
from secateur.formats.quantised import Quantised
from secateur.patterns.grids import Grid, Int2, Int3
from tests.formats.weights import changed, exact_linear, tokens_in

UNNAMED = (
    Quantised(sc.Fp8()),
    Quantised(sc.Int4(None), rounds_inputs=True),
    Quantised(sc.Int4(None), sc.NM(2, 4), rounds_inputs=True),
    Quantised(sc.Int8(), sc.NM(4, 8)),
    Quantised(sc.Fp8(), sc.NM(4, 8), rounds_inputs=True),
)

WITHOUT_ZEROS = (Quantised(sc.Int4()), Quantised(sc.Int4(None)), Quantised(sc.Int8()))


def weight_for(format: Quantised, width: int = 264) -> torch.Tensor:
    weight = tokens_in(6, width)
    return weight if format.pattern is None else weight * format.pattern.mask(weight.abs())


@pytest.mark.parametrize("format", UNNAMED, ids=str)
def test_it_has_no_name_to_type_and_is_a_value(format: Quantised) -> None:
    assert str(format) not in map(str, FORMATS)
    assert format == Quantised(format.grid, format.pattern, format.rounds_inputs)
    with pytest.raises(ValueError, match="unknown format"):
        parse_format(str(format))


@pytest.mark.parametrize("width", [136, 264])
@pytest.mark.parametrize("format", UNNAMED + WITHOUT_ZEROS, ids=str)
def test_it_stores_scale_times_code(format: Quantised, width: int) -> None:
    weight, grid = weight_for(format, width), format.grid
    assert format.why_not(weight) is None
    packed, scales = format.pack(weight), grid.scales(weight)
    assert packed.format == format and format.why_broken(packed) is None
    assert torch.equal(format.unpack(packed), grid.dequantised(grid.codes(weight, scales), scales))
    kept = weight.numel() * format.density(weight)
    assert packed["values"].nbytes == kept * grid.bits / 8


@pytest.mark.parametrize("format", UNNAMED + WITHOUT_ZEROS, ids=str)
def test_a_layer_of_it_is_right_and_made_again(format: Quantised) -> None:
    layer, x = SparseLinear(format.pack(weight_for(format))), tokens_in(5, 264)
    exact = exact_linear(x, format.unpack(layer.packed), None)
    rounding = 0.01 if format.rounds_inputs else 1e-6  # of inputs to 1 / 127 of the largest
    assert float((layer(x) - exact).abs().max()) <= rounding * float(exact.abs().max())
    other = empty_from(describe(layer), "", (format,))
    other.load_state_dict(layer.state_dict())
    assert other.format == format and torch.equal(other(x), layer(x))


def test_an_odd_number_of_4_bit_codes_ends_on_half_a_byte() -> None:
    weight = torch.tensor([[7.0, -3, 1]])
    packed = Quantised(sc.Int4(None)).pack(weight)
    assert packed["values"].tolist() == [[0x7 | 0xD << 4, 0x1]]
    assert torch.equal(packed.dense(), weight)
    damaged = changed(packed, values=torch.tensor([[0x88, 0x1]], dtype=torch.uint8))
    said = packed.format.why_broken(damaged)
    assert said == "values of row 0 column 0 hold the code -8"


@pytest.mark.parametrize(
    ("grid", "pattern", "rounds_inputs", "message"),
    [
        (sc.Int8(), sc.NM(1, 4), False, "every weight, 2:4 or 4:8, got 1:4: pass pattern=None"),
        (
            Int3(),
            sc.NM(2, 4),
            False,
            r"codes of 4 or 8 bits, got Int3\(group_size=128\): pass Int4",
        ),
        (Int2(None), None, True, r"codes of 4 or 8 bits, got Int2\(group_size=None\): pass Int4"),
        (sc.Int4(64), None, False, "int4 needs a group_size of 128, or None .* got 64"),
        (sc.Int4(), None, True, "int4_dynamic needs one scale per output, got one for every 128"),
    ],
)
def test_what_no_reference_computes_is_refused(
    grid: Grid, pattern: sc.NM | None, rounds_inputs: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Quantised(grid, pattern, rounds_inputs)
