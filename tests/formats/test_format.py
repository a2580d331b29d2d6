"""Formats by name: what parses, what is refused and with which words."""

import pytest
import torch

import secateur as sc
from secateur.formats import parse_format
from secateur.formats.block import Blocks
from secateur.formats.csr import Csr
from secateur.formats.quantised import Quantised
from tests.formats.weights import fitting_weight


@pytest.mark.parametrize(
    "text",
    [
        *("semi24", "block:64x64", "block:1x128", "bitmap", "csr"),
        *("semi24_int4", "semi24_int4:channel", "semi24_int8", "semi24_fp8"),
        *("int4", "int4:channel", "int8"),
        *("semi24_int8_dynamic", "semi24_fp8_dynamic", "int8_dynamic", "fp8_dynamic"),
    ],
)
def test_a_format_prints_as_it_parses(text: str) -> None:
    assert str(parse_format(text)) == text


def test_a_format_is_itself() -> None:
    assert parse_format("block:16x32") == Blocks(16, 32)
    assert parse_format(Csr()) == Csr()
    assert parse_format("semi24_int4:channel") == Quantised(sc.Int4(None), sc.NM(2, 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("semi25", "unknown format 'semi25': did you mean 'semi24'? formats are semi24, semi48, b"),
        ("zzz", "unknown format 'zzz': formats are semi24, semi48, block:64x64, bitmap, csr"),
        ("", "unknown format ''"),
        ("block", "format 'block' needs its rows and columns, got 'block': write 'block:64x64'"),
        ("block:64", "needs its rows and columns, got 'block:64'"),
        ("block:0x4", "needs its rows and columns, got 'block:0x4'"),
        ("block:4x4x4", "needs its rows and columns, got 'block:4x4x4'"),
        ("block:-4x4", "needs its rows and columns, got 'block:-4x4'"),
        ("csr:8", "format 'csr' takes no options, got 'csr:8': write 'csr'"),
        ("csr:", "format 'csr' takes no options, got 'csr:'"),
        ("semi24_int8:64", "format 'semi24_int8' takes no options, got 'semi24_int8:64'"),
        ("semi24_int4:64", "takes the option 'channel' or none, got 'semi24_int4:64': write 'se"),
        ("semi24_int4:", "takes the option 'channel' or none, got 'semi24_int4:'"),
        ("semi24_int5", "unknown format 'semi24_int5': did you mean 'semi24_int"),
    ],
)
def test_other_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_format(text)
    assert message in str(error.value)


def test_why_not_gives_each_format_s_own_reason() -> None:
    assert parse_format("semi24").why_not(fitting_weight("semi24", 8, 16)) is None
    assert parse_format("block:2x2").why_not(torch.eye(8)) is None
    assert "no 4x4 block is zero" in (parse_format("block:4x4").why_not(torch.ones(8, 8)) or "")
    assert "keep 4" in (parse_format("semi24").why_not(torch.ones(8, 8)) or "")
    assert "1.03x the bytes" in (parse_format("bitmap").why_not(torch.ones(8, 8)) or "")


def test_why_not_refuses_what_is_no_weight() -> None:
    reason = parse_format("csr").why_not(torch.zeros(8, dtype=torch.int8))
    assert reason == "csr needs a 2-D floating-point weight, got (8,) of torch.int8"
    reason = parse_format("csr").why_not(torch.zeros(2, 2, 2))
    assert reason == "csr needs a 2-D floating-point weight, got (2, 2, 2) of torch.float32"


def test_options_reach_the_format() -> None:
    chosen = parse_format("block:2x4")
    weight = torch.zeros(4, 8)
    weight[0, 0] = 1.0
    assert chosen.pack(weight).format == chosen
    assert chosen.density(weight) == 0.25
    assert chosen.empty((4, 8), 3, torch.float64).tensors["values"].shape == (3, 2, 4)
