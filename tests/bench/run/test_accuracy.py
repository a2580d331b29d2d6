"""The methods of the accuracy bench that are more than one call of the library."""

import copy

import pytest
import torch

import secateur as sc
from bench.lib.llama import TINY, random_llama
from bench.lib.methods import ANY_MODEL, EXTRA, METHODS
from secateur.reconstruct import CompensationReport

pytest.importorskip("transformers")


@pytest.mark.parametrize("method", ["best, 5% extra", "decompose(best), 5% extra"])
def test_with_an_adapter_there_are_zeros_few_parameters_and_less_error(method: str) -> None:
    """The hooks add what the adapter would: a product of its rank, and layers lose less."""
    dense = random_llama(TINY, 16, "cpu").float()
    generator = torch.Generator().manual_seed(1)
    batches = list(torch.randint(64, (8, 16), generator=generator).split(2))
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20)  # so that layers count beside the residual stream
    model = copy.deepcopy(dense)
    plan = sc.plan(model, "2:4")
    report = METHODS[method](model, plan, batches)
    assert isinstance(report, CompensationReport)
    sc.check(model, plan)
    assert 0 < report.extra <= EXTRA * report.parameters
    assert all(layer.error < layer.error_before for layer in report.layers)
    x = torch.randn(40, 32, generator=generator)
    for name in plan.layers:
        layer = model.get_submodule(name)
        if layer.in_features == 32:
            with torch.no_grad():
                added = layer(x) - torch.nn.functional.linear(x, layer.weight)
            assert int(torch.linalg.matrix_rank(added, rtol=1e-3)) == report.rank


def test_sampled_rows_stand_beside_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the method gets is the data, then so many rows of the same length, from the model."""
    dense = random_llama(TINY, 16, "cpu").float()
    batches = list(torch.randint(64, (6, 16)).split(4))
    seen = list[list[torch.Tensor]]()
    monkeypatch.setitem(METHODS, "sparsegpt", lambda model, plan, data: seen.append(data))
    METHODS["sparsegpt, 512 sampled rows"](dense, sc.plan(dense, "2:4"), batches)
    (data,) = seen
    assert all(one is other for one, other in zip(data, batches, strict=False))
    assert torch.cat(data[2:]).shape == (512, 16)
    assert not set(ANY_MODEL) & {name for name in METHODS if "sampled" in name}
