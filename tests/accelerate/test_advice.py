"""What would be faster: the sentence follows the measurements, and these are of what it names."""

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from secateur.accelerate import verb as accelerate
from secateur.accelerate.advice import (
    EXAMPLE,
    FORMAT,
    MOST_WEIGHTS,
    PATTERN,
    TILE,
    blocks_that_gain,
)
from secateur.accelerate.layer_report import LayerReport, LayerTimes
from secateur.accelerate.report import AccelerateReport
from secateur.accelerate.verb import accelerate_
from secateur.patterns import parse

SMALL, LARGE, ODD = (512, 256), (2048, 2048), (100, 4096)


class Machine:
    """Measures by a table of ratios of shapes; what is not in it does not gain."""

    def __init__(self, gains: Mapping[tuple[int, int], tuple[float, ...]]) -> None:
        self.gains, self.seen = gains, list[tuple[int, int]]()

    def __call__(self, model: nn.Module, format: str) -> AccelerateReport:
        weight = next(model.parameters())
        assert format == FORMAT and weight.dtype == torch.bfloat16
        assert parse(PATTERN).violation(weight != 0) is None, "not the zeros that it names"
        tiles = weight.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).float().abs().sum((1, 3))
        assert float((tiles != 0).float().mean()) == pytest.approx(0.2, abs=0.02)
        shape = (weight.shape[0], weight.shape[1])
        self.seen.append(shape)
        ratios = self.gains.get(shape, ())
        measured = tuple(LayerTimes(1, (("dense", 10.0 * r), ("x", 10.0)), "x") for r in ratios)
        name = FORMAT if ratios else "dense"
        layer = LayerReport("0", shape, name, measured, "0", 0, 0, "")
        return AccelerateReport("cpu", 1, (1, 16), (layer,))


def said(machine: Machine, *shapes: tuple[int, int]) -> str:
    return blocks_that_gain(shapes, torch.bfloat16, (1, 16), machine)


def test_the_largest_layer_of_whole_tiles_is_named_with_its_least_gain() -> None:
    machine = Machine({LARGE: (3.0, 2.25)})
    assert said(machine, SMALL, LARGE, ODD, (MOST_WEIGHTS // 64, 128)) == (
        "what would be faster here: block:64x64@0.8; a layer of 2048 x 2048 with it ran 2.2 times "
        "as fast as dense at tokens 1, 16: sc.plan(model, 'block:64x64@0.8')"
    )
    assert machine.seen == [LARGE]


def test_of_small_layers_a_larger_one_is_named() -> None:
    machine = Machine({EXAMPLE: (2.0,)})
    assert said(machine, SMALL).endswith(
        "larger layers in tiles of 64 x 64; one of 1024 x 1024 with block:64x64@0.8 ran 2.0 times "
        "as fast as dense at tokens 1, 16, one of 512 x 256 was not faster"
    )
    assert machine.seen == [SMALL, EXAMPLE]
    assert said(machine, ODD).endswith("at tokens 1, 16, this model has none")


def test_where_tiles_do_not_gain_it_says_so() -> None:
    machine = Machine({})
    for shape in (SMALL, ODD):
        assert said(machine, shape).startswith(
            "block:64x64@0.8 would not be faster here either: a layer of 1024 x 1024 was not"
        )
    machine = Machine({EXAMPLE: (2.0,)})
    assert said(machine, LARGE).endswith("a layer of 2048 x 2048 was not"), "EXAMPLE is smaller"
    assert machine.seen == [LARGE]


def test_accelerate_advises_where_nothing_gains_and_only_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accelerate, "blocks_that_gain", lambda *asked: f"advice {asked[:3]}")
    model = nn.Sequential(nn.Linear(64, 128), nn.Embedding(4, 4))
    report = accelerate_(model, tokens=(1,))
    assert report.advice == "advice ([(128, 64)], torch.float32, (1,))"
    assert str(report).endswith(f"\n{report.advice}") and report.to_dict()["advice"]
    monkeypatch.setattr(accelerate, "_why_unmeasurable", lambda weight: "no")
    assert accelerate_(model, tokens=(1,)).advice == ""
