"""`pack_` and `unpack_`: which layers change, and that a refusal changes none."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from secateur.formats import SparseLinear, pack_, unpack_
from tests.formats.weights import fitting_weight, tokens_in
from tests.reconstruct.problems import gpt2_and_batches

pytestmark = pytest.mark.usefixtures("no_cpu_kernels")


class Model(nn.Module):
    """A 2:4 layer, a dense one, one of width 6, a nested 2:4 one, and a conv."""

    def __init__(self) -> None:
        super().__init__()
        self.up = linear("semi24", 16, 24)
        self.dense = nn.Linear(16, 8)
        self.ragged = nn.Linear(6, 4)
        self.block = nn.Sequential(nn.ReLU(), linear("semi24", 24, 16))
        self.conv = nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(self.up(x))
        return result


def linear(format: str, out: int, width: int) -> nn.Linear:
    layer = nn.Linear(width, out)
    layer.weight.data.copy_(fitting_weight(format, out, width))
    return layer


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def test_every_fitting_layer_with_zeros_is_packed() -> None:
    model, x = Model().eval(), tokens_in(5, 24)
    expected, before = model(x), kinds(model)
    report = pack_(model)
    assert [row[0] for row in report.layers] == ["up", "block.1"]
    assert kinds(model) == before | {"up": SparseLinear, "block.1": SparseLinear}
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert not model.up.training and model.up.name == "up"


def test_the_report_counts_bytes() -> None:
    report = pack_(Model())
    dense, packed = 16 * 24 * 4, 16 * 12 * 4 + 16 * 3
    assert report.layers[0] == ("up", "semi24", dense, packed, 0.0)
    assert report.bytes_before == 2 * dense
    assert report.bytes_after == packed + 24 * 8 * 4 + 24 * 2
    assert str(report) == (
        "2 layers, 0.0 MB of weights before, 0.0 MB after; the whole model takes 0.0 MB instead "
        "of 0.0 MB"
    )


def test_the_report_says_what_the_whole_model_takes() -> None:
    """Bytes count what is no layer too: an embedding of 8 MB, and a buffer."""
    model = nn.Sequential(nn.Embedding(2000, 1000), nn.Linear(1000, 1000, bias=False))
    model.register_buffer("table", torch.ones(250_000))
    with torch.no_grad():
        model[1].weight[:, ::2] = 0
    report = pack_(model)
    assert report.model_bytes == 8_000_000 + 4_000_000 + 1_000_000
    assert str(report).endswith("; the whole model takes 11.1 MB instead of 13.0 MB")
    assert str(unpack_(model)).endswith("; the whole model takes 13.0 MB instead of 11.1 MB")


def test_the_report_counts_what_is_arranged_too() -> None:
    """In use a block layer holds the row of each block, instead of where each row starts."""
    weight = fitting_weight("block:4x8", 16, 24)
    model = nn.Sequential(nn.Linear(24, 16))
    model[0].weight.data.copy_(weight)
    report = pack_(model, "block:4x8")
    stored = sum(tensor.nbytes for tensor in model[0].packed.tensors.values())
    held = stored + 4 * len(model[0].packed["values"]) - 4 * (16 // 4 + 1)
    assert model[0].dispatch == "cpu" and held != stored
    assert report.bytes_after == model[0].nbytes == held
    again = unpack_(model)
    assert (again.bytes_before, again.bytes_after) == (held, weight.nbytes)


def test_unpack_restores_plain_linears_exactly() -> None:
    model = Model()
    before, state = kinds(model), {k: v.clone() for k, v in model.state_dict().items()}
    bias = model.up.bias
    pack_(model)
    report = unpack_(model)
    assert [row[0] for row in report.layers] == ["up", "block.1"]
    assert report.layers[0][3] == 16 * 24 * 4
    assert kinds(model) == before
    assert model.up.bias is bias
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    weight = model.up.weight
    assert type(weight) is nn.Parameter and weight.requires_grad
    assert not hasattr(model.up, "packed")
    weight.data.add_(1)


def test_only_listed_layers_are_packed() -> None:
    model = Model()
    assert [row[0] for row in pack_(model, "bitmap", ["dense"]).layers] == ["dense"]
    assert type(model.up) is nn.Linear and type(model.dense) is SparseLinear


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["block.1", "dense"], "layer 'dense': pack needs a 2:4 weight, row 0, columns 0..3 keep"),
        (
            ["up", "ragged"],
            "layer 'ragged': pack needs in_features that is a multiple of 4, got (4",
        ),
        (["up", "block.2"], "no layer is named 'block.2': closest: 'block.1'"),
        (["up", "xyzzy"], "no layer is named 'xyzzy': the model has no name like it"),
        (["up", "conv"], "layer 'conv' needs to be an nn.Linear, got Conv1d: leave it out"),
    ],
)
def test_a_refused_layer_changes_nothing(layers: list[str], message: str) -> None:
    model = Model()
    before, state = kinds(model), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        pack_(model, "semi24", layers)
    assert message in str(error.value)
    assert kinds(model) == before
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_model_without_a_fitting_layer_says_why() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 6))
    with pytest.raises(ValueError) as error:
        pack_(model)
    text = str(error.value)
    assert text.startswith("pack_ needs a layer that fits semi24, got none ('0': semi24 needs at")
    assert "'1':" in text and "'2':" in text and "'3':" not in text
    with pytest.raises(ValueError, match=r"got none \(the model has no nn.Linear\)"):
        pack_(nn.Sequential(nn.ReLU()))


def test_a_dense_weight_is_no_default_even_where_it_fits() -> None:
    model = nn.Sequential(linear("block:4x8", 16, 24), nn.Linear(24, 16))
    pack_(model, "block:4x8")
    assert type(model[0]) is SparseLinear and type(model[1]) is nn.Linear


def test_a_bare_layer_is_refused() -> None:
    bare = linear("semi24", 16, 24)
    for layers in (None, [""]):
        with pytest.raises(ValueError, match="a model that holds its layers, got a bare Linear"):
            pack_(bare, layers=layers)
    holder = nn.Sequential(bare)
    pack_(holder)
    with pytest.raises(ValueError, match="unpack_ needs a model that holds its layers"):
        unpack_(holder[0])


def test_a_tied_weight_stays_tied() -> None:
    model = nn.Sequential(nn.Embedding(16, 24), linear("semi24", 16, 24))
    model[0].weight = model[1].weight
    with pytest.raises(ValueError, match="layer '1': its weight is tied to '0', and packing would"):
        pack_(model, layers=["1"])
    with pytest.raises(ValueError, match="'1': its weight is tied to '0'"):
        pack_(model)
    assert model[0].weight is model[1].weight


def test_a_layer_used_twice_is_swapped_in_both_places() -> None:
    shared = linear("semi24", 16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert [row[0] for row in pack_(model).layers] == ["a"]
    assert type(model["a"]) is SparseLinear and model["b"][0] is model["a"]
    unpack_(model)
    assert type(model["a"]) is nn.Linear and model["b"][0] is model["a"]


def test_hooks_are_not_dropped_in_silence() -> None:
    model = Model()
    handle = model.up.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layer 'up': it has hooks, which packing would drop"):
        pack_(model, layers=["up"])
    assert [row[0] for row in pack_(model).layers] == ["block.1"]
    handle.remove()
    assert [row[0] for row in pack_(model).layers] == ["up"]


def test_a_replaced_forward_is_not_dropped_in_silence() -> None:
    model = Model()
    model.up.forward = lambda x: x  # as offloading libraries do
    with pytest.raises(ValueError, match="its forward has been replaced, which packing would undo"):
        pack_(model, layers=["up"])


def test_an_unknown_format_changes_nothing() -> None:
    model = Model()
    with pytest.raises(ValueError, match="unknown format 'semi42'"):
        pack_(model, "semi42")
    assert type(model.up) is nn.Linear


def test_a_frozen_bias_stays_frozen() -> None:
    model = Model().requires_grad_(False)
    pack_(model)
    assert not model.up.bias.requires_grad


class Projection(nn.Linear):
    """Another initialisation, the same forward."""


class Scaled(nn.Linear):
    """What it computes it computes with a tensor of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("scale", torch.ones(()))


class Squared(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).square()


def test_a_subclass_with_the_same_forward_and_tensors_is_packed() -> None:
    model = nn.Sequential(Projection(24, 16), Scaled(24, 16), Squared(24, 16))
    for layer in model:
        layer.weight = linear("semi24", 16, 24).weight
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    x = torch.randn(5, 24)
    expected = model[0](x)
    assert [row[0] for row in pack_(model).layers] == ["0"]
    assert type(model[1]) is Scaled and type(model[2]) is Squared
    torch.testing.assert_close(model[0](x), expected)
    with pytest.raises(ValueError, match="layer '1' needs to be an nn.Linear, got Scaled"):
        pack_(model, layers=["1"])
    unpack_(model)
    assert type(model[0]) is nn.Linear


def test_the_output_projection_of_attention_is_none() -> None:
    model = nn.Sequential(nn.MultiheadAttention(24, 2), linear("semi24", 16, 24))
    model[0].out_proj.weight = nn.Parameter(linear("semi24", 24, 24).weight.detach())
    assert [row[0] for row in pack_(model).layers] == ["1"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, partial(torch.compile, backend="eager")])
def test_a_wrapped_model_is_packed_inside(wrap) -> None:
    model = Model()
    assert [row[0] for row in pack_(wrap(model)).layers] == ["up", "block.1"]
    assert type(model.up) is SparseLinear
    assert [row[0] for row in unpack_(wrap(model)).layers] == ["up", "block.1"]
    assert type(model.up) is nn.Linear


def test_packed_in_inference_mode_gradients_flow_through_it_all_the_same() -> None:
    model = Model()
    with torch.inference_mode():
        pack_(model)
    assert not any(buffer.is_inference() for buffer in model.buffers())
    x = torch.randn(3, model.up.in_features, requires_grad=True)
    model.up(x).sum().backward()
    torch.testing.assert_close(x.grad, model.up.weight.sum(0).expand(3, -1).clone())
    with torch.inference_mode():
        unpack_(model)
    assert not model.up.weight.is_inference()


def test_an_adapter_is_packed_by_name_only() -> None:
    """LoRA's second factor begins at zero, which takes no room packed, and could not be trained."""
    model = nn.ModuleDict({"base": linear("semi24", 16, 24), "lora_B": nn.Linear(24, 16)})
    nn.init.zeros_(model["lora_B"].weight)
    assert [row[0] for row in pack_(model, "bitmap").layers] == ["base"]
    assert type(model["lora_B"]) is nn.Linear
    assert [row[0] for row in pack_(model, "bitmap", ["lora_B"]).layers] == ["lora_B"]


def pruned_gpt2() -> tuple[nn.Module, Tensor]:
    model, batches = gpt2_and_batches(blocks=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".c_" in name and parameter.dim() == 2:  # 2:4 along its inputs, which are its rows
                parameter.unflatten(0, (-1, 4))[:, 1:3] = 0
    return model, batches[0]


def test_conv1d_packs_and_unpacks_to_what_it_was() -> None:
    model, ids = pruned_gpt2()
    expected, before = model(ids).logits, kinds(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    report = pack_(model)
    assert len(report.layers) == 8
    assert model.transformer.h[0].mlp.c_fc.shape == (64, 16)
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    copied = deepcopy(model)
    for packed in (model, copied):
        unpack_(packed)
        assert kinds(packed) == before
        assert list(packed.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in packed.state_dict().items())
        assert torch.equal(packed(ids).logits, expected)


def test_a_conv1d_with_a_hook_is_left_alone() -> None:
    assert len(pack_(pruned_with_hook()).layers) == 7
    with pytest.raises(ValueError, match=r"'transformer\.h\.0\.mlp\.c_fc': it has hooks"):
        pack_(pruned_with_hook(), layers=["transformer.h.0.mlp.c_fc"])


def pruned_with_hook() -> nn.Module:
    model, _ = pruned_gpt2()
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_: None)
    return model
