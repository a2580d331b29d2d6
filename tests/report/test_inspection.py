"""What `inspect` says of weights whose zeros were set by hand."""

import pytest
import torch
from torch import nn

from secateur.formats import pack_
from secateur.report.inspection import Inspection, LayerInspection, inspect


def linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def only(inspection: Inspection) -> LayerInspection:
    assert len(inspection.layers) == 1
    return inspection.layers[0]


def test_zeros_rows_and_columns_are_counted() -> None:
    weight = torch.ones(3, 8, dtype=torch.bfloat16)
    weight[1] = 0
    weight[:, 5:7] = 0
    found = only(inspect(nn.Sequential(linear(weight))))
    assert found.layer == "0" and found.kind == "Linear" and found.shape == (3, 8)
    assert found.dtype == "bfloat16"
    assert found.zeros == 12 / 24
    assert (found.zero_rows, found.zero_columns) == (1, 2)
    assert found.holds == ()


@pytest.mark.parametrize(
    ("row", "holds"),
    [
        ([1, 0, 0, 0, 0, 0, 1, 0], ("1:4", "2:4", "4:8")),
        ([1, 1, 0, 0, 0, 1, 1, 0], ("2:4", "4:8")),
        ([1, 1, 1, 0, 0, 0, 1, 0], ("4:8",)),
        ([1, 1, 1, 0, 1, 1, 0, 0], ()),
    ],
)
def test_patterns_that_the_zeros_hold_already(row: list[float], holds: tuple[str, ...]) -> None:
    weight = torch.tensor([row, [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.float32)
    assert only(inspect(nn.Sequential(linear(weight)))).holds == holds


def test_zero_tiles_are_shares_of_the_tiles_that_fit() -> None:
    weight = torch.ones(64, 128)
    weight[:64, 64:] = 0
    weight[16:48, :32] = 0
    found = only(inspect(nn.Sequential(linear(weight))))
    # 64: one tile of two; 32: four of eight, the 32 x 32 hole lies across two; 16: 16 + 4 of 32.
    assert found.zero_tiles == {"64x64": 1 / 2, "32x32": 4 / 8, "16x16": 20 / 32}
    row = dict(zip(inspect(nn.Sequential(linear(weight))).columns, _row(found), strict=True))
    assert row["zero tiles"] == "50.0% of 64x64"


def _row(layer: LayerInspection) -> tuple[str, ...]:
    return Inspection((layer,)).rows()[0]


def test_what_does_not_fit_the_shape_is_told() -> None:
    found = only(inspect(nn.Sequential(linear(torch.ones(48, 36)))))
    assert found.fits == ("1:4", "2:4")
    columns = Inspection((found,)).columns
    assert dict(zip(columns, _row(found), strict=True))["does not fit"] == "4:8 64x64 32x32 16x16"


def test_a_convolution_is_read_along_its_input_channels() -> None:
    layer = nn.Conv2d(4, 2, 3, bias=False)
    with torch.no_grad():
        layer.weight[:, 2:] = 0
    found = only(inspect(nn.Sequential(layer)))
    assert found.shape == (2, 36) and found.zeros == 0.5
    assert found.holds == ("2:4",)


def test_groups_that_do_not_divide_the_channels_are_held_as_padded() -> None:
    layer = nn.Conv2d(3, 2, 2, bias=False)  # 12 columns, which 4 divides
    assert only(inspect(nn.Sequential(layer))).holds == ()
    with torch.no_grad():
        layer.weight[:, 1] = 0
    found = only(inspect(nn.Sequential(layer)))
    assert found.fits == ()
    assert found.holds == ("2:4@pad-remainder",), "4:8 keeps 4, more than there are"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.other = nn.Embedding(3, 8)
        self.inner = nn.Linear(8, 8)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.lm_head = nn.Linear(8, 12, bias=False)
        self.lm_head.weight = self.embed.weight


def test_why_layers_would_be_left_alone() -> None:
    found = {layer.layer: layer.skipped for layer in inspect(Tied()).layers}
    assert found["inner"] == ""
    assert "tied to lm_head" in found["embed"] and "tied to embed" in found["lm_head"]
    assert "depthwise" in found["depthwise"]
    assert "name it" in found["other"]


def test_totals_count_only_what_would_be_pruned() -> None:
    model = Tied()
    with torch.no_grad():
        model.inner.weight[:2] = 0
        model.other.weight.zero_()
    inspection = inspect(model)
    assert inspection.zeros == 0.25
    assert inspection.summary.startswith("1 of 3 layers can be pruned: 64 weights, 25.0% zeros")


def test_packed_layers_are_read_as_what_they_hold() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 16)
    weight.view(-1, 4)[:, :2] = 0
    model = nn.Sequential(linear(weight))
    pack_(model, "semi24")
    found = only(inspect(model))
    assert found.packed and found.zeros == 0.5 and found.holds == ("2:4", "4:8")
    assert found.skipped == "packed: unpack_ it first"
    inspection = inspect(model)
    assert inspection.zeros == 0.5
    assert inspection.summary.startswith("0 of 1 layers can be pruned, 1 are packed: 256 weights")


def test_a_parametrized_weight_is_told_apart_from_a_packed_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    found = inspect(model).layers[0]
    assert found.computed and not found.packed and "remove_parametrizations" in found.skipped


def test_a_mask_of_torch_prune_is_told_with_its_zeros() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Embedding(4, 4))
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    inspection = inspect(model)
    assert inspection.layers[0].zeros == 0.5
    assert "torch.nn.utils.prune.remove(layer, 'weight')" in inspection.layers[0].skipped
    assert inspection.summary.startswith(
        "1 of 2 layers can be pruned, 1 compute their weight: 512 weights, 25.0% zeros"
    )


def test_empty_layers_have_no_zeros() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        found = inspect(nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 8))).layers
    assert [(r.shape, r.zeros, r.holds) for r in found] == [((0, 8), 0.0, ()), ((8, 0), 0.0, ())]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int8], ids=str)
def test_weights_of_other_dtypes_are_read_and_their_remedy_is_told(dtype: torch.dtype) -> None:
    weight = torch.eye(4).repeat(1, 2).to(dtype)
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    found = only(inspect(model))
    assert found.zeros == 0.75 and found.holds == ("1:4", "2:4", "4:8")
    assert found.skipped.startswith(f"its weight is {str(dtype).removeprefix('torch.')}: ")


def test_a_layer_without_a_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="0.weight has no shape yet .* run the model once"):
        inspect(nn.Sequential(nn.LazyLinear(4)))


def test_the_model_is_left_as_it_was() -> None:
    model = Tied().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inspect(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_text_and_data_say_the_same() -> None:
    weight = torch.ones(4, 8)
    weight[:, ::2] = 0
    inspection = inspect(nn.Sequential(linear(weight)))
    text = str(inspection)
    assert "2:4 4:8" in text and "50.0%" in text
    assert text.endswith("all of them hold 2:4, 4:8; the shapes of all fit 1:4, 2:4, 4:8")
    data = inspection.to_dict()["layers"][0]
    assert data["zeros"] == 0.5 and data["zero_columns"] == 4 and data["holds"] == ("2:4", "4:8")


def test_nothing_to_inspect_is_an_error() -> None:
    with pytest.raises(ValueError, match="ReLU has no linear, convolution or embedding layer"):
        inspect(nn.ReLU())
    with pytest.raises(ValueError, match=r"0.weight has no data \(meta device\)"):
        inspect(nn.Sequential(nn.Linear(4, 4, device="meta")))
