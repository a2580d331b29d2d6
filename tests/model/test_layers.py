"""Layers as matrices, and selecting them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.model.layers import from_matrix, input_rows, matrix, pattern_for, select
from secateur.patterns import NM, Unstructured


class Conv1D(nn.Module):
    """A linear layer that stores [in, out], as transformers' GPT-2 does."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.nf = out_features
        self.weight = nn.Parameter(torch.randn(in_features, out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


CONVOLUTIONS = [
    nn.Conv2d(6, 5, 3, bias=False),
    nn.Conv2d(6, 5, (3, 2), stride=2, padding=1, bias=False),
    nn.Conv2d(6, 5, 3, padding="same", dilation=2, bias=False),
    nn.Conv2d(6, 5, 3, padding=(2, 1), padding_mode="circular", bias=False),
    nn.Conv2d(6, 5, 1, bias=False),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_the_matrix_times_input_rows_is_the_convolution(conv: nn.Conv2d) -> None:
    x = torch.randn(2, 6, 9, 8)
    expected = conv(x).movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(input_rows(conv, x) @ matrix(conv).T, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "module", [*CONVOLUTIONS, nn.Linear(6, 5), nn.Embedding(7, 6), Conv1D(5, 6)], ids=str
)
def test_from_matrix_undoes_matrix(module: nn.Module) -> None:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    assert torch.equal(from_matrix(module, matrix(module)), weight)


def test_conv1d_is_seen_transposed() -> None:
    module, x = Conv1D(5, 6), torch.randn(3, 6)
    assert matrix(module).shape == (5, 6)
    torch.testing.assert_close(F.linear(x, matrix(module)), module(x))


def test_groups_along_input_channels_lie_together_in_a_convolution() -> None:
    conv = nn.Conv2d(4, 1, 2, bias=False)
    weight = torch.arange(16.0).view(1, 4, 2, 2)
    assert matrix(conv, weight)[0, :4].tolist() == weight[0, :, 0, 0].tolist()


def test_groups_start_anew_at_each_position_where_they_do_not_divide_the_channels() -> None:
    ragged, even = nn.Conv2d(6, 5, 2), nn.Conv2d(8, 5, 3)
    assert pattern_for(ragged, NM(2, 4, "pad")) == NM(2, 4, "pad", 6)
    assert pattern_for(ragged, NM(2, 4, channels=3)) == NM(2, 4, channels=6)
    assert pattern_for(ragged, NM(1, 3)) == NM(1, 3)
    assert pattern_for(even, NM(2, 4, "pad")) == NM(2, 4, "pad")
    assert pattern_for(even, NM(2, 4, "pad", 8)) == NM(2, 4, "pad")
    assert pattern_for(nn.Linear(6, 5), NM(2, 4, "pad")) == NM(2, 4, "pad")
    assert pattern_for(ragged, Unstructured(0.5)) == Unstructured(0.5)


def test_three_dimensional_inputs_are_rows_of_tokens() -> None:
    x = torch.randn(2, 3, 6)
    assert torch.equal(input_rows(nn.Linear(6, 5), x), x.view(6, 6))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up_proj": nn.Linear(8, 16), "down_proj": nn.Linear(16, 8)})
            for _ in range(2)
        )
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.conv = nn.Conv2d(8, 4, 3)
        self.lm_head = nn.Linear(8, 10)
        self.tied = nn.Linear(8, 10)
        self.tied.weight = self.embed.weight


ALL = [
    "blocks.0.up_proj",
    "blocks.0.down_proj",
    "blocks.1.up_proj",
    "blocks.1.down_proj",
    "conv",
]


def test_by_default_heads_tied_weights_and_depthwise_are_left_alone_and_said() -> None:
    selection = select(Model())
    assert list(selection.layers) == ALL
    assert selection.skipped == {
        "depthwise": "depthwise convolution: its groups do not share inputs",
        "lm_head": "output head: name it to prune it",
        "tied": "its weight is tied to embed",
    }


@pytest.mark.parametrize(
    ("selectors", "ignore", "chosen"),
    [
        (["*.up_proj"], [], ["blocks.0.up_proj", "blocks.1.up_proj"]),
        ([r"re:blocks\.1\."], [], ["blocks.1.up_proj", "blocks.1.down_proj"]),
        ([nn.Conv2d], [], ["conv"]),
        ([lambda name, module: "down" in name], [], ["blocks.0.down_proj", "blocks.1.down_proj"]),
        (["lm_head"], [], ["lm_head"]),
        (None, ["conv", "*.0.*"], ["blocks.1.up_proj", "blocks.1.down_proj"]),
        (None, [nn.Linear], ["conv"]),
        ("lm_head", [], ["lm_head"]),
        (nn.Conv2d, "depthwise", ["conv"]),
    ],
)
def test_selectors(selectors, ignore, chosen) -> None:
    assert list(select(Model(), selectors, ignore).layers) == chosen


def test_the_first_match_wins() -> None:
    selection = select(Model(), ["blocks.0.up_proj", "*.up_proj", "*"])
    assert selection.matched_by["blocks.0.up_proj"] == 0
    assert selection.matched_by["blocks.1.up_proj"] == 1
    assert selection.matched_by["conv"] == 2


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        (
            ["blocks.0.up_projj"],
            "No module matches 'blocks.0.up_projj'. Closest: 'blocks.0.up_proj', ",
        ),
        (["*.gate_proj"], "No module matches '*.gate_proj'."),
        (["re:^nothing$"], "No module matches 're:^nothing$'."),
        ([nn.LSTM], "no prunable layer of Model matches <class"),
        (["blocks.0"], "'blocks.0' is a ModuleDict, which has no weight matrix to prune"),
        (["tied"], "tied cannot be pruned: its weight is tied to embed"),
        (["depthwise"], "depthwise cannot be pruned: depthwise convolution"),
    ],
)
def test_wrong_selectors_say_what_is_wrong(selectors, message: str) -> None:
    with pytest.raises(ValueError) as error:
        select(Model(), selectors)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (nn.ConvTranspose2d(8, 8, 2), "transposed convolution: of convolutions only Conv2d can"),
        (nn.Conv1d(8, 8, 3), "Conv1d: of convolutions only Conv2d can be pruned"),
        (nn.Conv3d(8, 8, 3), "Conv3d: of convolutions only Conv2d can be pruned"),
        (nn.Conv2d(8, 8, 3, groups=2), "grouped convolution: its groups do not share inputs"),
        (nn.Conv2d(8, 8, 3, groups=8), "depthwise convolution: its groups do not share inputs"),
    ],
    ids=lambda other: type(other).__name__,
)
def test_convolutions_that_cannot_be_pruned_are_left_alone_or_refused_by_name(
    other: nn.Module, reason: str
) -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3), "other": other})
    for selectors in (None, "*", [nn.Conv2d, type(other)], ["conv", "o*"]):
        selection = select(model, selectors)
        assert list(selection.layers) == ["conv"]
        assert selection.skipped["other"].startswith(reason)
    assert list(select(model, "conv").skipped) == []
    assert select(model, ignore="other").skipped == {"other": "ignored"}
    with pytest.raises(ValueError, match=f"other cannot be pruned: {reason}"):
        select(model, ["conv", "other"])
    with pytest.raises(ValueError, match=rf"no layer is left to prune .*: other \({reason}"):
        select(nn.ModuleDict({"other": other}), type(other))


class InOrder(nn.Linear):
    """The product and the bias one after another, as FalconLinear computes them."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Clamped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-10, 10)


class Standardised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return nn.functional.linear(input, weight, self.bias)


class Dropping(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(input, 0.5, self.training))


class WithAdapter(nn.Linear):
    """Its own tensors are zero at first, so that it computes the same until it is trained."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.low = nn.Parameter(torch.zeros(self.out_features, 2))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input[..., :2] @ self.low.T


class Wanting(nn.Linear):
    def forward(self, input: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input) + more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_linear_layer_is_known_by_what_it_computes(dtype: torch.dtype) -> None:
    """And not by its class: a forward of its own is tried on numbers."""
    kinds = (InOrder, Clamped, Standardised, Dropping, WithAdapter, Wanting)
    model = nn.ModuleDict({kind.__name__: kind(32, 16) for kind in kinds}).to(dtype)
    state = torch.get_rng_state()
    selection = select(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(selection.layers) == ["InOrder"]
    others = {kind.__name__ for kind in kinds} - {"InOrder"}
    assert selection.skipped == {
        name: f"{name} computes something else than x @ weight.T" for name in others
    }
    with pytest.raises(ValueError, match="no layer is left"):
        select(InOrder(4, 4).to("meta"))  # there are no numbers


def test_an_ignore_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="No module matches 'lm_heads'. Closest: 'lm_head'"):
        select(Model(), ignore=["lm_heads"])


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(ValueError, match="no layer is left to prune in Sequential"):
        select(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"no layer is left to prune in Linear: .* \(ignored\)"):
        select(nn.Linear(2, 2), ignore=[nn.Linear])


def numbered() -> nn.Module:
    return nn.ModuleDict(
        {
            "layers": nn.ModuleList(
                nn.ModuleDict(
                    {"mlp": nn.ModuleDict({"up": nn.Linear(8, 8)}), "attn": nn.Linear(8, 8)}
                )
                for _ in range(3)
            )
        }
    )


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("*.mpl.*", "*.mlp.*"),
        ("layer.*.mlp.up", "layers.*.mlp.up"),
        ("*.attention", "*.attn"),
        (r"re:\.mpl\.up$", r"re:\.mlp\.up$"),
        ("*.upp", "*.up"),
    ],
)
def test_a_glob_that_matches_nothing_is_corrected_where_it_failed(wrong: str, meant: str) -> None:
    with pytest.raises(ValueError) as error:
        select(numbered(), wrong)
    assert str(error.value) == f"No module matches {wrong!r}. Did you mean {meant!r}?"
    assert select(numbered(), meant).layers


def test_a_glob_that_is_like_no_name_gets_the_first_names() -> None:
    with pytest.raises(
        ValueError, match=r"'\*.xyz.\*'. Closest: 'layers.0.mlp.up', 'layers.0.attn'"
    ):
        select(numbered(), "*.xyz.*")


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        ("layers.1.attn.weight", ["layers.1.attn"]),
        ("*.attn.weight", ["layers.0.attn", "layers.1.attn", "layers.2.attn"]),
        ("layers.0.*.weight", ["layers.0.mlp.up", "layers.0.attn"]),
    ],
)
def test_the_name_of_a_weight_is_that_of_its_layer(selector: str, chosen: list[str]) -> None:
    assert list(select(numbered(), selector).layers) == chosen
    assert list(select(numbered(), ignore=selector).skipped) == chosen


def test_a_head_is_named_by_its_weight_too() -> None:
    assert list(select(Model(), "lm_head.weight").layers) == ["lm_head"]
    assert list(select(nn.Linear(8, 8), "weight").layers) == [""]


def test_wrapped_models_have_the_names_of_what_they_wrap() -> None:
    model = Model()
    compiled = torch.compile(model, backend="eager")
    for wrapped in (nn.DataParallel(model), compiled, nn.DataParallel(compiled)):
        assert select(wrapped) == select(model)
        assert list(select(wrapped, "lm_head").layers) == ["lm_head"]


class Adapted(nn.Module):
    """A layer with an adapter as PEFT marks it, by the names of the adapter's children."""

    adapter_layer_names = ("left", "right")

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 8)
        self.left = nn.ModuleDict({"default": nn.Linear(8, 4)})
        self.right = nn.ModuleDict({"default": nn.Linear(4, 8)})


class Copied(nn.Module):
    adapter_layer_names = ("modules_to_save",)

    def __init__(self) -> None:
        super().__init__()
        self.original_module = nn.Linear(8, 8)
        self.modules_to_save = nn.ModuleDict({"default": nn.Linear(8, 8)})


def test_adapters_are_left_alone_and_said_unless_named() -> None:
    model = nn.ModuleDict(
        {"q": Adapted(), "k": Copied(), "v": nn.ModuleDict({"lora_A": nn.Linear(8, 4)})}
    )
    selection = select(model)
    assert list(selection.layers) == ["q.base_layer"]
    assert selection.skipped == {
        "q.left.default": "an adapter's weight (left): name it to prune it",
        "q.right.default": "an adapter's weight (right): name it to prune it",
        "k.original_module": (
            "the adapter's copy in modules_to_save runs in its place: name it to prune it"
        ),
        "k.modules_to_save.default": "an adapter's weight (modules_to_save): name it to prune it",
        "v.lora_A": "an adapter's weight (LoRA): name it to prune it",
    }
    assert list(select(model, ["q.left.default"]).layers) == ["q.left.default"]
    assert list(select(model, "*").layers) == ["q.base_layer"], "a glob names nothing in full"


def test_peft_says_which_weights_are_its_adapters() -> None:
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8), "lm_head": nn.Linear(8, 8)})
    config = peft.LoraConfig(target_modules=["q", "lm_head"], modules_to_save=["k"])
    selection = select(peft.get_peft_model(model, config))
    assert list(selection.layers) == ["base_model.model.q.base_layer"]
    assert {
        name.removeprefix("base_model.model."): why for name, why in selection.skipped.items()
    } == {
        "q.lora_A.default": "an adapter's weight (lora_A): name it to prune it",
        "q.lora_B.default": "an adapter's weight (lora_B): name it to prune it",
        "k.original_module": (
            "the adapter's copy in modules_to_save runs in its place: name it to prune it"
        ),
        "k.modules_to_save.default": "an adapter's weight (modules_to_save): name it to prune it",
        "lm_head.base_layer": "output head: name it to prune it",
        "lm_head.lora_A.default": "an adapter's weight (lora_A): name it to prune it",
        "lm_head.lora_B.default": "an adapter's weight (lora_B): name it to prune it",
    }
