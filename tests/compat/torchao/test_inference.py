"""sparsify_ and quantize_: what they pack, what they refuse, and that they change nothing then."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import secateur as sc
from secateur import SparseLinear
from secateur.compat.torchao import (
    MarlinSparseLayout,
    SemiSparseLayout,
    SemiSparseWeightConfig,
    SupermaskLinear,
    WeightNormSparsifier,
    apply_fake_sparsity,
    block_sparse_weight,
    int4_weight_only,
    int8_dynamic_activation_int8_weight,
    quantize_,
    semi_sparse_weight,
    sparsify_,
)

pytestmark = pytest.mark.usefixtures("no_cpu_kernels")

SLOW_HERE = r"run \S+ by its reference here, right but slower than dense, first '.*accelerate_"


class Tower(nn.Module):
    """Two MLPs by name, and a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"up": nn.Linear(64, 128), "down": nn.Linear(128, 64)})
        self.norm = nn.LayerNorm(64)
        self.second = nn.ModuleDict({"up": nn.Linear(64, 128), "down": nn.Linear(128, 64)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first["down"](self.first["up"](x).relu()))
        result: Tensor = self.second["down"](self.second["up"](x).relu())
        return result


def tower() -> Tower:
    torch.manual_seed(0)
    return Tower().eval()


def packed(model: nn.Module) -> dict[str, str]:
    return {n: str(m.format) for n, m in model.named_modules() if isinstance(m, SparseLinear)}


@pytest.mark.parametrize("verb", [sparsify_, quantize_])
def test_2_4_weights_are_packed_in_place_and_the_model_returned(verb: Callable[..., Any]) -> None:
    model = tower()
    assert apply_fake_sparsity(model) is model
    dense, x = copy.deepcopy(model), torch.randn(2, 3, 64)
    with pytest.warns(UserWarning, match=r"4 of 4 layers " + SLOW_HERE) as caught:
        assert verb(model, semi_sparse_weight()) is model
    assert len(caught) == 1
    assert set(packed(model).values()) == {"semi24"} and len(packed(model)) == 4
    torch.testing.assert_close(model(x), dense(x))
    assert not model.first["up"].training


def test_fake_sparsity_is_magnitude_2_4_on_ordinary_weights() -> None:
    model, reference = tower(), tower()
    apply_fake_sparsity(model)
    sc.prune_(reference, "2:4")
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True)
    )
    assert type(model.first["up"]) is nn.Linear and sc.check(model, "2:4")
    odd = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    before = odd[1].weight.clone()
    with pytest.raises(ValueError, match=r"0: 2:4 needs in_features divisible by 4, got 6"):
        apply_fake_sparsity(odd)
    assert torch.equal(odd[1].weight, before)
    apply_fake_sparsity(odd, filter_fn=lambda module, name: name == "1")
    assert sc.check(odd, sc.plan(odd, "2:4", layers="1")) == {"1": 0.5}


def test_a_weight_that_is_not_2_4_is_named_and_nothing_has_changed() -> None:
    model = tower()
    apply_fake_sparsity(model)
    with torch.no_grad():
        model.second["up"].weight[5, 8:12] = 1.0
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"second\.up \(2:4\).*first columns 8\.\.11 of row 5"):
        sparsify_(model, semi_sparse_weight())
    with pytest.raises(ValueError, match=r"second\.up .*zeros are made by apply_fake_sparsity"):
        quantize_(model, int4_weight_only(layout=MarlinSparseLayout()))
    assert list(model.modules()) == before


def test_the_seed_s_recipe_mixes_formats_by_filter() -> None:
    """8 bits where nothing is pruned, 8 bits and 2:4 for one layer, 2:4 for another."""
    model = tower()
    sc.prune_(model, sc.plan(model, "2:4", layers="second.*"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(model, int8_dynamic_activation_int8_weight(), lambda m, n: n == "first.up")
        quantize_(
            model,
            int8_dynamic_activation_int8_weight(layout=SemiSparseLayout()),
            lambda m, n: n == "second.up",
        )
        sparsify_(model, semi_sparse_weight(), lambda m, n: n == "second.down")
    assert packed(model) == {
        "first.up": "int8_dynamic",
        "second.up": "semi24_int8_dynamic",
        "second.down": "semi24",
    }
    assert type(model.first["down"]) is nn.Linear


def test_a_second_call_without_filter_takes_what_is_left() -> None:
    model = tower()
    sc.prune_(model, "2:4")
    with pytest.warns(UserWarning, match=r"1 of 1 layers"):
        sparsify_(model, semi_sparse_weight(), lambda m, n: n == "first.up")
    with pytest.warns(UserWarning, match=r"3 of 3 layers"):
        sparsify_(model, semi_sparse_weight())
    assert len(packed(model)) == 4
    with pytest.raises(ValueError, match=r"neither packed nor tied, Tower has none"):
        sparsify_(model, semi_sparse_weight())


def test_blocks_run_on_a_cpu_without_a_warning() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
    with pytest.raises(ValueError, match=r"layer '0': no 64x64 block is zero"):
        sparsify_(model, block_sparse_weight())
    sc.prune_(model, "block:64x64@0.5")
    dense, x = copy.deepcopy(model), torch.randn(3, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsify_(model, block_sparse_weight(blocksize=64))
    assert packed(model) == {"0": "block:64x64", "2": "block:64x64"}
    torch.testing.assert_close(model(x), dense(x))


def test_int4_reports_no_error_on_a_weight_of_its_grid() -> None:
    model = nn.Sequential(nn.Linear(256, 64)).half()
    apply_fake_sparsity(model)
    with pytest.warns(UserWarning, match="semi24_int4"):
        quantize_(model, int4_weight_only(layout=MarlinSparseLayout()))
    once = model[0].weight.clone()
    sc.unpack_(model)
    assert torch.equal(model[0].weight, once) and sc.check(model, "2:4")


def test_a_warning_that_is_an_error_has_changed_nothing() -> None:
    model = tower()
    sc.prune_(model, "2:4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=SLOW_HERE):
            sparsify_(model, semi_sparse_weight())
    assert packed(model) == {}


def test_the_filter_sees_modules_and_names_and_stops_at_a_match() -> None:
    model, seen = tower(), list[str]()

    def up(module: nn.Module, name: str) -> bool:
        seen.append(name)
        assert dict(model.named_modules())[name] is module
        return name.endswith("up")

    quantized = quantize_(model, lambda module: nn.Identity(), up)
    assert quantized is model and isinstance(model.first["up"], nn.Identity)
    first, second = ("first", "first.up", "first.down"), ("second", "second.up", "second.down")
    assert seen == ["", *first, "norm", *second]
    seen.clear()
    quantize_(model, lambda module: module, lambda m, n: seen.append(n) or n == "second")
    assert "second.up" not in seen


def test_a_filter_that_matches_no_linear_layer_is_refused() -> None:
    model = tower()
    with pytest.raises(ValueError, match=r"needs an nn.Linear, 'norm' is a LayerNorm.*filter_fn"):
        sparsify_(model, semi_sparse_weight(), lambda m, n: "norm" in n)
    with pytest.raises(ValueError, match=r"filter_fn matches, Tower has none.*'first\.up'"):
        sparsify_(model, semi_sparse_weight(), lambda m, n: n == "third")


def test_a_function_is_a_config_again() -> None:
    model = tower()
    sparsify_(
        model, lambda layer: SupermaskLinear.from_linear(layer, sparsity_level=0.5, blocksize=16)
    )
    assert all(isinstance(m["up"], SupermaskLinear) for m in (model.first, model.second))
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"returns a module, got Parameter for 'first\.up'"):
        sparsify_(model, lambda layer: layer.weight, lambda m, n: n == "first.up")
    assert list(model.modules()) == before


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_config_is_refused() -> None:
    model = tower()
    with pytest.raises(ValueError, match=r"write SemiSparseWeightConfig\(\)"):
        sparsify_(model, SemiSparseWeightConfig)
    with pytest.raises(ValueError, match=r"got '2:4': semi_sparse_weight\(\) is one"):
        sparsify_(model, "2:4")
    own = type("Int8WeightOnlyConfig", (), {"__module__": "torchao.quantization.quant_api"})()
    with pytest.raises(ValueError, match=r"torchao's own Int8WeightOnlyConfig.*torchao\.quant"):
        quantize_(model, own)


def test_what_would_be_lost_is_refused() -> None:
    model = tower()
    apply_fake_sparsity(model)
    model.first["up"].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"layer 'first\.up': it has hooks"):
        sparsify_(model, semi_sparse_weight())
    sparsifier = WeightNormSparsifier(1.0, (1, 4), 2)
    sparsifier.prepare(model, [{"tensor_fqn": "second.up.weight"}])
    with pytest.raises(ValueError, match=r"'second\.up' is a Parametrized.*squash"):
        sparsify_(model, semi_sparse_weight())
    assert parametrize.is_parametrized(model.second["up"]) and packed(model) == {}
    bare = nn.Linear(8, 8)
    apply_fake_sparsity(bare)
    with pytest.raises(ValueError, match=r"bare Linear: wrap it in nn.Sequential"):
        sparsify_(bare, lambda layer: nn.Identity())


def test_tied_weights_and_attention_are_left_out_by_default_and_refused_by_name() -> None:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(16, 64),
            "mlp": nn.Linear(64, 64),
            "attention": nn.MultiheadAttention(64, 2),
            "head": nn.Linear(64, 16, bias=False),
        }
    )
    model["head"].weight = model["embed"].weight
    apply_fake_sparsity(model)
    assert bool(model["embed"].weight.all()) and bool(model["attention"].out_proj.weight.all())
    with pytest.warns(UserWarning, match="1 of 1"):
        sparsify_(model, semi_sparse_weight())
    assert packed(model) == {"mlp": "semi24"}
    with pytest.raises(ValueError, match=r"layer 'head': its weight is tied to 'embed'"):
        quantize_(model, int8_dynamic_activation_int8_weight(), lambda m, n: n == "head")


def test_a_layer_used_twice_is_packed_once_under_either_name() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    apply_fake_sparsity(model)
    with pytest.warns(UserWarning, match="1 of 1"):
        sparsify_(model, semi_sparse_weight(), lambda m, n: n == "b.0")
    assert isinstance(model["a"][0], SparseLinear) and model["a"][0] is model["b"][0]
