"""The Pareto front of methods: which dots are on it, and where they stand."""

from pathlib import Path
from xml.etree import ElementTree

from bench.lib.results import RESULTS
from bench.tables.pages import FIGURES
from bench.tables.pareto import PERPLEXITY, _x, _y, pareto
from bench.tables.scatter import front_of

SVG = "{http://www.w3.org/2000/svg}"


def test_on_the_front_is_what_no_other_beats_in_both() -> None:
    found = {
        "quick": (1.0, 9.0),
        "as quick and worse": (1.0, 9.5),
        "slower and no better": (5.0, 9.0),
        "middle": (10.0, 7.0),
        "slow and worse": (20.0, 7.5),
        "best": (30.0, 6.0),
    }
    assert front_of(found) == ["quick", "middle", "best"]


def test_the_axes_are_seconds_by_their_logarithm_and_perplexity() -> None:
    assert _x(10.0) - _x(1.0) == _x(100.0) - _x(10.0) > 0
    assert _y(6.0) > _y(7.0) > _y(PERPLEXITY[1]) == _y(20.0)


def test_every_method_has_a_dot_and_its_name() -> None:
    root = ElementTree.fromstring(pareto(RESULTS))
    names = [str(text.text) for text in root.iter(f"{SVG}text")]
    assert len(list(root.iter(f"{SVG}circle"))) >= 8
    assert {"sparsegpt", "alps", "thorough"} <= set(names)
    assert FIGURES[Path(__file__).parents[3] / "docs" / "pareto.svg"] is pareto
