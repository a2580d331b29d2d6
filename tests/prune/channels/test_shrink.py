"""The laws of removal: the smaller model computes what the zeros did, and reloads plainly."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.prune.channels import Followed, Removed, dropped, follow, least, remove_
from tests.prune.channels.models import (
    Branches,
    Grouped,
    Odd,
    Recurrent,
    ResNet,
    ViT,
    Words,
    all_but,
    images,
    inner_weights,
    lively,
    llama,
    numbers,
    sequences,
    weights,
)


def chosen(model: nn.Module, followed: Followed, names: Sequence[str], level: float) -> Removed:
    """The units of least L1 norm, that share of each pool."""
    channels, keep = followed.channels, dict[str, Tensor]()
    for name in names:
        scores = {
            each: model.get_parameter(each).detach().movedim(channels.dim_of(each), 0)
            for each in channels.pool(name, names)
        }
        norms = {each: rows.flatten(1).abs().sum(1) for each, rows in scores.items()}
        keep |= least(channels, norms, lambda n: int(level * n))
    return dropped(channels, keep)


@torch.no_grad()
def zero_(
    model: nn.Module, followed: Followed, names: Sequence[str], removed: Removed, biases: bool
) -> None:
    """Zero these units in every parameter that makes them."""
    channels, parameters = followed.channels, dict(model.named_parameters())
    for made in names:
        for name, dim in channels.made_with(channels.units(made)):
            parameter = parameters.get(name)
            if parameter is not None and (biases or parameter.dim() > 1):
                gone = np.flatnonzero(removed[channels.states[name, dim]])
                parameter.index_fill_(dim, torch.from_numpy(gone), 0)


def run(model: nn.Module, batch: Tensor | dict[str, Tensor]) -> Tensor:
    return model(**batch).logits if isinstance(batch, dict) else model(batch)


def pruned_as_masked(
    model: nn.Module,
    batch: Tensor | dict[str, Tensor],
    names: Sequence[str],
    smaller: Callable[[], nn.Module],
    level: float = 0.5,
    biases: bool = True,
) -> nn.Module:
    """The laws: outputs of the model with zeros, a plain module of the smaller configuration."""
    dense = run(model, batch)
    modules = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    followed = follow(model, batch)
    removed = chosen(model, followed, names, level)
    zero_(model, followed, names, removed, biases)
    masked = run(model, batch)
    assert not torch.allclose(dense, masked), "something is zero"
    assert remove_(model, followed, removed) == {}
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    torch.testing.assert_close(run(model, batch), masked, rtol=1e-9, atol=1e-9)
    fresh = smaller().double().eval()
    fresh.load_state_dict(model.state_dict())
    assert numbers(fresh) == numbers(model)
    torch.testing.assert_close(run(fresh, batch), masked, rtol=1e-9, atol=1e-9)
    return model


def test_a_residual_network_loses_the_same_channels_on_both_sides_of_each_addition() -> None:
    model = lively(ResNet())
    pruned_as_masked(model, images(), all_but(model, "head"), lambda: ResNet((4, 6), (5, 3)))
    assert model.a.conv1.in_channels == 4
    assert model.bn.num_features == 4
    assert repr(model) == repr(ResNet((4, 6), (5, 3)))


def test_naming_one_layer_of_an_addition_prunes_all_of_them() -> None:
    model = lively(ResNet())
    layers = weights("a.conv2")
    pruned_as_masked(model, images(), layers, lambda: ResNet((4, 12), (10, 6)))


def test_conv_bn_relu_conv() -> None:
    def make(width: int = 8) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 4, 3, padding=1),
        )

    pruned = pruned_as_masked(lively(make()), images(), weights("0"), lambda: make(6), level=0.25)
    assert numbers(pruned) == 6 * 27 + 6 + 12 + 4 * 6 * 9 + 4


@pytest.mark.parametrize(
    "layer, sizes", [("block.qkv", {"heads": 2}), ("block.fc1", {"hidden": 8})]
)
def test_heads_and_hidden_units_of_a_vision_transformer(layer: str, sizes: dict[str, int]) -> None:
    model = lively(ViT())
    pruned_as_masked(model, images(), weights(layer), lambda: ViT(**sizes))
    assert model.block.num_heads == sizes.get("heads", 4)
    assert model.block.head_dim == 3


def test_grouped_queries_go_with_the_head_whose_keys_they_read() -> None:
    for named in (["q_proj"], ["k_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]):
        model = lively(Grouped())
        pruned_as_masked(
            model, sequences(8), weights(*named), lambda: Grouped(heads=4, groups=2), level=0.34
        )
        assert (model.num_heads, model.num_key_value_heads, model.head_dim) == (4, 2, 2)


def test_all_gates_layers_and_directions_of_an_lstm_lose_the_same_hidden_units() -> None:
    layers = ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    for named in (layers, layers[1:]):
        model = lively(Recurrent())
        pruned_as_masked(model, sequences(4), named, lambda: Recurrent(3))
        assert (model.lstm.hidden_size, model.lstm.input_size) == (3, 4)


def test_branches_of_a_concatenation_a_depthwise_convolution_and_whole_groups() -> None:
    """GroupNorm has 7 groups of 4, from 2 channels of the concatenation each."""
    model = lively(Branches())
    left, right = 4, 4  # of 6 and 8; whole pairs, of the two branches by themselves
    names = weights("left", "right")
    pruned_as_masked(model, images(), names, lambda: Branches(left, right, groups=4))
    assert (model.left.out_channels, model.right.out_channels) == (left, right)


def test_a_gated_mlp_in_one_projection_loses_gates_with_what_they_gate() -> None:
    model, tokens = lively(Words()), torch.arange(10).view(2, 5)
    pruned_as_masked(model, tokens, weights("up"), lambda: Words(hidden=6))


def test_an_embedding_is_pruned_by_its_columns() -> None:
    def make(width: int = 8) -> nn.Module:
        return nn.Sequential(nn.Embedding(7, width), nn.Tanh(), nn.Linear(width, 3))

    tokens = torch.arange(10).view(2, 5) % 7
    pruned = pruned_as_masked(lively(make()), tokens, weights("0"), lambda: make(4))
    assert pruned[0].embedding_dim == 4


def test_a_flattened_image_takes_all_positions_of_a_channel() -> None:
    def make(width: int = 8) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, width, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(9 * width, 5),
        )

    pruned_as_masked(lively(make()), images(), weights("0"), lambda: make(4))


def test_a_transposed_convolution_and_prelu() -> None:
    def make(width: int = 8, up: int = 6) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, width, 3),
            nn.PReLU(width),
            nn.ConvTranspose2d(width, up, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(up, 2, 1),
        )

    pruned_as_masked(lively(make()), images(), weights("0", "2"), lambda: make(4, 3))


ACTIVATIONS = (
    "ReLU RReLU Hardtanh ReLU6 Sigmoid Hardsigmoid Tanh SiLU Mish Hardswish ELU CELU SELU "
    "Hardshrink LeakyReLU LogSigmoid Softplus PReLU Softsign Tanhshrink GELU Dropout Dropout2d "
    "AlphaDropout FeatureAlphaDropout Softshrink Identity"
)


@pytest.mark.parametrize(
    "names", [ACTIVATIONS.split()[start::4] for start in range(4)], ids=lambda names: names[0]
)
def test_every_activation_between_layers(names: list[str]) -> None:
    def make(width: int = 6) -> nn.Module:
        stages: list[nn.Module] = [nn.Conv2d(3, width, 1)]
        for name in names:
            stages += [getattr(nn, name)(), nn.Conv2d(width, width, 1)]
        stages[-1] = nn.Conv2d(width, 5, 1)
        return nn.Sequential(*stages)

    model = lively(make())
    pruned_as_masked(model, images(), all_but(model, str(len(model) - 1)), lambda: make(3))


@pytest.mark.parametrize(
    "pools",
    [
        (nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(2), nn.AdaptiveAvgPool2d(1)),
        (nn.AvgPool2d(2), nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.Upsample(scale_factor=2)),
        (nn.LPPool2d(2, 2), nn.ReplicationPad2d(1), nn.MaxPool2d(3, padding=1)),
    ],
)
def test_every_pooling_and_padding_between_layers(pools: tuple[nn.Module, ...]) -> None:
    def make(width: int = 6) -> nn.Module:
        stages: list[nn.Module] = [nn.Conv2d(3, width, 1)]
        for pool in pools:
            stages += [copy.deepcopy(pool), nn.Conv2d(width, width, 1)]
        stages[-1] = nn.Conv2d(width, 5, 1)
        return nn.Sequential(*stages)

    model = lively(make())
    pruned_as_masked(model, images(), all_but(model, str(len(model) - 1)), lambda: make(3))


def test_positions_of_maxima_go_with_their_channels() -> None:
    class Unpooled(nn.Module):
        def __init__(self, width: int = 6) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, width, 1), nn.Conv2d(width, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            largest, where = F.max_pool2d(self.first(x), 2, return_indices=True)
            return self.second(largest * (where % 2))

    pruned_as_masked(lively(Unpooled()), images(), weights("first"), lambda: Unpooled(3))


def test_a_constant_passes_through_batch_norm_and_an_unpadded_convolution() -> None:
    def make(width: int = 8) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.GELU(), nn.Conv2d(width, 4, 3)
        )

    pruned_as_masked(lively(make()), images(), weights("0"), lambda: make(4), biases=False)


def test_attention_written_with_einsum_and_a_single_head() -> None:
    class Single(nn.Module):
        def __init__(self, width: int = 6, values: int = 8) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, width), nn.Linear(4, width)
            self.v, self.o = nn.Linear(4, values), nn.Linear(values, 2)

        def forward(self, x: Tensor) -> Tensor:
            weights = torch.einsum("btd,bsd->bts", self.q(x), self.k(x)).softmax(-1)
            return self.o(weights @ self.v(x))

    pruned_as_masked(lively(Single()), sequences(4), weights("q", "v"), lambda: Single(3, 4))


def test_tables_that_stay_leave_whole_heads_and_buffers_by_head_keep_them() -> None:
    class Table(nn.Module):
        """A table of angles for each step, shared by all heads, as in rotary embeddings."""

        def __init__(self, heads: int = 4, table: tuple[int, ...] = (5, 1, 3)) -> None:
            super().__init__()
            self.heads = heads
            self.first, self.second = nn.Linear(8, 3 * heads), nn.Linear(3 * heads, 2)
            self.register_buffer("table", torch.rand(table))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(
                (self.first(x).unflatten(-1, (self.heads, 3)) * self.table).flatten(2)
            )

    model = lively(Table())
    pruned_as_masked(model, sequences(8), weights("first"), lambda: Table(2))
    channels = follow(lively(Table(table=(1, 4, 3))), sequences(8)).channels
    why = "mul.Tensor of the model itself joins it to channels"
    assert why in str(channels.why_not("first.weight", 0))


def test_norms_without_parameters() -> None:
    def make(width: int = 8, groups: int = 4) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, width, 3),
            nn.GroupNorm(groups, width, affine=False),
            nn.SiLU(),
            nn.Conv2d(width, 2, 3),
        )

    pruned_as_masked(lively(make()), images(), weights("0"), lambda: make(4, 2))


def test_a_language_model_of_transformers_reloads_by_its_configuration() -> None:
    model, batch = lively(llama()), {"input_ids": torch.arange(10).view(2, 5)}
    pruned_as_masked(model, batch, inner_weights(model), lambda: llama(2, 1, 12))


class RootMeanSquare(nn.Module):
    """RMSNorm as language models write it, without a weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize(
    "norm",
    [lambda width: nn.LayerNorm(width, elementwise_affine=False), lambda _: RootMeanSquare()],
)
def test_a_norm_without_parameters_normalises_what_is_left(
    norm: Callable[[int], nn.Module],
) -> None:
    model = lively(nn.Sequential(nn.Linear(4, 6), norm(6), nn.Linear(6, 3)))
    first, _, second = copy.deepcopy(model)
    followed = follow(model, sequences(4))
    removed = chosen(model, followed, weights("0"), 0.5)
    zero_(model, followed, weights("0"), removed, biases=True)
    keep = torch.from_numpy(followed.channels.kept("0.weight", 0, removed))
    assert remove_(model, followed, removed) == {}
    hidden = norm(3)(first(sequences(4))[..., keep])
    wanted = F.linear(hidden, second.weight[:, keep], second.bias)
    torch.testing.assert_close(model(sequences(4)), wanted)


def test_an_embedding_that_is_the_output_embedding_too_is_masked_as_both() -> None:
    class Tied(nn.Module):
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(7, width), nn.Linear(width, width)
            self.head = nn.Linear(width, 7)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            return self.head(x + F.relu(self.mix(x)))

    tokens = torch.arange(10).view(2, 5) % 7
    pruned = pruned_as_masked(lively(Tied()), tokens, weights("mix"), lambda: Tied(4))
    assert pruned.head.weight is pruned.embed.weight


def test_channels_in_reverse_are_pruned_in_reverse() -> None:
    """Libraries that take an unknown operation for one by elements remove other columns here."""
    model = lively(Odd(lambda x: F.relu(x).flip(-1)))
    before = copy.deepcopy(model)
    followed = follow(model, sequences(4))
    removed = chosen(model, followed, weights("first"), 0.5)
    zero_(model, followed, weights("first"), removed, biases=True)
    keep = torch.from_numpy(~removed[followed.channels.units("first.weight")])
    assert remove_(model, followed, removed) == {}
    assert torch.equal(model.second.weight, before.second.weight[:, keep.flip(0)])


def test_a_number_of_channels_in_the_forward_is_an_error() -> None:
    model = lively(Odd(lambda x: x / x.shape[-1]))
    followed = follow(model, sequences(4))
    removed = chosen(model, followed, weights("first"), 0.5)
    zero_(model, followed, weights("first"), removed, biases=True)
    with pytest.raises(
        ValueError, match=r"would compute something else: .*div.Tensor of the model itself"
    ):
        remove_(model, followed, removed)


@pytest.mark.parametrize(
    "middle, width, gone, why",
    [
        (lambda x: x[..., 2:4], 2, 0, "slice.Tensor|linear.default of second"),
        (lambda x: x[..., -4:-2], 2, 5, "linear.default of second brings other channels"),
        (lambda x: x[..., ::2], 3, 3, "linear.default of second brings other channels"),
        (lambda x: x.roll(1, -1), 6, 5, "linear.default of second brings other channels"),
        (lambda x: torch.cat([x[..., 2:], x[..., :2]], -1), 6, 1, "slice.Tensor of the model"),
    ],
)
def test_positions_that_move_are_an_error(
    middle: Callable[[Tensor], Tensor], width: int, gone: int, why: str
) -> None:
    """Sizes fit in all but the last: without a look at the order other channels would be read."""
    model = Odd(middle)
    model.second = nn.Linear(width, 3)
    followed = follow(lively(model), sequences(4))
    removed = dropped(followed.channels, {"first.weight": torch.arange(6) != gone})
    zero_(model, followed, weights("first"), removed, biases=True)
    masked = model(sequences(4))
    with pytest.raises(ValueError, match=f"would compute something else: .*({why})"):
        remove_(model, followed, removed)
    assert torch.equal(model(sequences(4)), masked)
    assert model.first.out_features == 6


def test_channels_whose_constant_a_layer_cannot_absorb_stay_and_are_named() -> None:
    model = lively(nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3, bias=False)))
    followed = follow(model, sequences(4))
    removed = dropped(followed.channels, {"0.weight": torch.arange(6) != 2})
    zero_(model, followed, weights("0"), removed, biases=True)
    masked = model(sequences(4))
    held = remove_(model, followed, removed)
    unit = int(followed.channels.units("0.weight")[2])
    assert held == {unit: "2 reads them, and it has no bias to take the constant that they are"}
    assert torch.equal(model(sequences(4)), masked) and model[0].out_features == 6


def test_a_layer_whose_weight_is_computed_stays_beside_those_that_shrink() -> None:
    """As the positions of a speech model, a convolution with weight norm."""

    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            conv = nn.Conv1d(4, 4, 3, padding=1, groups=2)
            self.positions = nn.utils.parametrizations.weight_norm(conv)
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.positions(x.transpose(1, 2)).transpose(1, 2)
            return x + self.down(F.relu(self.up(x)))

    model, x = lively(Speech()), sequences(4)
    followed = follow(model, x)
    removed = chosen(model, followed, ["up.weight"], 0.5)
    zero_(model, followed, ["up.weight"], removed, True)
    masked = model(x)
    assert remove_(model, followed, removed) == {}
    assert model.up.out_features == 3 and model.positions.groups == 2
    torch.testing.assert_close(model(x), masked)


def test_the_width_of_each_head_is_normalised_and_whole_heads_go() -> None:
    class Normed(Grouped):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q_proj(x).unflatten(-1, (-1, 2))
            return self.o_proj((q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6)).flatten(2))

    model, x = lively(Normed()), sequences(8)
    followed = follow(model, x)
    assert len(np.unique(followed.channels.units("q_proj.weight"))) == 6
    assert followed.channels.why_not("q_proj.weight", 0) is None
    removed = chosen(model, followed, ["q_proj.weight"], 0.5)
    zero_(model, followed, ["q_proj.weight"], removed, True)
    masked = model(x)
    assert remove_(model, followed, removed) == {}
    assert model.q_proj.out_features == 6
    torch.testing.assert_close(model(x), masked)


@pytest.mark.parametrize(
    "middle",
    [
        lambda x: torch.maximum(x, x.max(0, keepdim=True).values),
        lambda x: torch.max(x, -x) + torch.cat([x, x[:, :0]], 1),
        lambda x: x.float().type_as(x),
    ],
)
def test_extremes_empty_pieces_and_casts_pass_channels_on(middle: Callable[..., Tensor]) -> None:
    model = lively(Odd(middle))
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    followed = follow(model, x)
    removed = chosen(model, followed, ["first.weight"], 0.5)
    zero_(model, followed, ["first.weight"], removed, True)
    masked = model(x)
    assert remove_(model, followed, removed) == {}
    assert model.second.in_features == 3
    torch.testing.assert_close(model(x), masked)
