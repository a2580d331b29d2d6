"""The contract between the halves: the back half packs exactly what the front half leaves."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc


@pytest.mark.parametrize(
    ("pattern", "format"),
    [
        ("2:4", "semi24"),
        ("block:8x8@0.5", "block:8x8"),
        ("unstructured:0.8", "csr"),
        ("unstructured:0.8", "bitmap"),
    ],
)
@pytest.mark.parametrize("method", [sc.magnitude, sc.wanda, sc.sparsegpt])
def test_pruned_packed_and_unpacked_is_the_pruned_model(pattern: str, format: str, method) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    batches = [torch.randn(64, 32)]
    verb = sc.reconstruct_ if method is sc.sparsegpt else sc.prune_
    plan = sc.plan(model, pattern)
    verb(model, plan, method, batches)
    pruned = copy.deepcopy(model)
    sc.pack_(model, format)
    assert [type(layer).__name__ for layer in model] == ["SparseLinear", "GELU", "SparseLinear"]
    torch.testing.assert_close(model(batches[0]), pruned(batches[0]), rtol=1e-5, atol=1e-5)
    sc.unpack_(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    sc.check(model, plan)
