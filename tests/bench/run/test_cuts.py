"""The fit of the cost model finds what its timings were made with."""

import pytest
import torch

from bench.run.cuts import excess, fit
from secateur.formats.kernels.decode24 import Kind
from secateur.formats.kernels.decode24.config import Case
from secateur.formats.kernels.decode24.cuts import cuts
from secateur.formats.kernels.decode24.rule import COSTS, quantities


def test_the_cost_models_fit_finds_the_coefficients_it_was_made_with() -> None:
    made = []
    for columns in (2048, 4096):
        case = Case(Kind.INT4, True, torch.bfloat16, 4096, columns, 16)
        for cut in cuts(case, {1: 132, 2: 66, 4: 30, 8: 15}, True):
            us = sum(c * q for c, q in zip(COSTS[16], quantities(case, cut), strict=True))
            made.append((case, cut, us))
    found = fit(made)
    assert max(excess(made, found)) == pytest.approx(1, abs=1e-3)
    for case, cut, us in made[::50]:
        again = sum(c * q for c, q in zip(found, quantities(case, cut), strict=True))
        assert again == pytest.approx(us, rel=0.02)
