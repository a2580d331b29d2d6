"""The fit of the cost model finds what its timings were made with."""

import pytest
import torch

from bench.run.cuts import excess, fit
from secateur.formats.kernels.decode24 import Kind
from secateur.formats.kernels.decode24.config import Case
from secateur.formats.kernels.decode24.cost_model import COSTS, quantities
from secateur.formats.kernels.decode24.launch_configs import launch_configs


def test_the_cost_models_fit_finds_the_coefficients_it_was_made_with() -> None:
    made = []
    for columns in (2048, 4096):
        case = Case(Kind.INT4, True, torch.bfloat16, 4096, columns, 16)
        for config in launch_configs(case, {1: 132, 2: 66, 4: 30, 8: 15}, True):
            us = sum(c * q for c, q in zip(COSTS[16], quantities(case, config), strict=True))
            made.append((case, config, us))
    found = fit(made)
    assert max(excess(made, found)) == pytest.approx(1, abs=1e-3)
    for case, config, us in made[::50]:
        again = sum(c * q for c, q in zip(found, quantities(case, config), strict=True))
        assert again == pytest.approx(us, rel=0.02)
