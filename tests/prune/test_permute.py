"""Reordered hidden units: the model computes the same, and patterns keep more of the score."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import secateur as sc
from secateur.criteria import fisher
from secateur.model.layers import weight_of
from secateur.prune.free_dimensions import FREE, Free
from secateur.prune.permute import PermuteReport, permute_
from tests.models import Decoder
from tests.prune.test_permutation import kept_by_hand


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- models --------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Llama's MLP, here with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 32), nn.Linear(8, 32)
        self.down_proj = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TwoLayers(nn.Module):
    """An MLP with `between` between its layers, which returns the hidden units too with `tap`."""

    def __init__(self, between: Callable[[Tensor], Tensor] = F.gelu, tap: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, 8)
        self.between, self.tap = between, tap

    def forward(self, x: Tensor) -> Any:
        hidden = self.between(self.fc1(x))
        return (self.fc2(hidden), hidden) if self.tap else self.fc2(hidden)


class GroupedQueries(nn.Module):
    """Four query heads of 8 channels, two heads of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 8
        self.q_proj, self.k_proj = nn.Linear(16, 32), nn.Linear(16, 16)
        self.v_proj, self.o_proj = nn.Linear(16, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make().double().eval()


def skewed_(model: nn.Module, layer: str) -> None:
    """Make the first half of each run of 8 inputs count much more, so that the order matters."""
    weight = weight_of(model.get_submodule(layer))
    with torch.no_grad():
        weight *= torch.tensor([4.0] * 4 + [0.25] * 4).repeat(weight.shape[1] // 8)


CASES = {
    "gated": (Gated, "down_proj", ("gate_proj", "up_proj"), 8),
    "two layers": (TwoLayers, "fc2", ("fc1",), 8),
    "grouped queries": (GroupedQueries, "o_proj", ("v_proj",), 16),
}


def changed(model: nn.Module, dense: dict[str, Tensor]) -> set[str]:
    return {n for n, value in model.state_dict().items() if not torch.equal(value, dense[n])}


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("criterion", [sc.magnitude, sc.wanda])
@pytest.mark.parametrize("case", CASES)
def test_the_output_is_unchanged_and_more_is_kept(
    case: str, criterion: Callable[..., Tensor]
) -> None:
    make, consumer, producers, width = CASES[case]
    for seed in range(3):
        model = seeded(make, seed)
        skewed_(model, consumer)
        dense, x = state(model), normal(2, 5, width, seed=1)
        want = model(x).detach()
        report = permute_(model, sc.plan(model, "2:4"), criterion, [normal(2, 5, width, seed=2)])
        torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
        assert changed(model, dense) == {
            f"{consumer}.weight",
            *(f"{p}.{key}" for p in producers for key in ("weight", "bias")),
        }
        (row,) = report.layers
        assert (row.layer, row.producers, row.pattern) == (consumer, producers, "2:4")
        assert row.kept > row.kept_before


def test_kept_shares_are_those_of_the_weights_before_and_after() -> None:
    model = seeded(GroupedQueries)
    skewed_(model, "o_proj")
    weights = [weight_of(model.get_submodule("o_proj")).detach().clone()]
    plan = sc.plan(model, {"o_proj": "2:4"})
    (row,) = permute_(model, plan, sc.magnitude, [normal(2, 5, 16)]).layers
    weights.append(weight_of(model.get_submodule("o_proj")).detach())
    shares = [kept_by_hand(w.abs(), list(range(32)), 2, 4) / float(w.abs().sum()) for w in weights]
    assert [row.kept_before, row.kept] == pytest.approx(shares, rel=1e-6)


def test_columns_of_heads_stay_in_their_head_and_queries_of_a_group_agree() -> None:
    model = seeded(GroupedQueries)
    skewed_(model, "o_proj")
    before = weight_of(model.get_submodule("o_proj")).detach().clone()
    permute_(model, sc.plan(model, {"o_proj": "2:4"}), sc.magnitude, [normal(2, 5, 16)])
    after = weight_of(model.get_submodule("o_proj")).detach()
    moved = [int((before == after[:, j, None]).all(0).nonzero()) for j in range(32)]
    orders = [[j - 8 * head for j in moved[8 * head : 8 * head + 8]] for head in range(4)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[0] == orders[1] != list(range(8))
    assert orders[2] == orders[3] != list(range(8))


def test_pruning_afterwards_loses_less_of_the_output() -> None:
    model = seeded(Gated)
    skewed_(model, "down_proj")
    x = normal(64, 8)
    want, errors = model(x).detach(), []
    for permuted in (False, True):
        one = copy.deepcopy(model)
        plan = sc.plan(one, {"down_proj": "2:4"})
        if permuted:
            permute_(one, plan, sc.wanda, [x])
        sc.prune_(one, plan, sc.wanda, [x])
        sc.check(one, plan)
        errors.append(float((one(x).detach() - want).norm()))
    assert errors[1] < 0.8 * errors[0]


def test_scores_by_gradients_order_too() -> None:
    model = seeded(TwoLayers)
    skewed_(model, "fc2")
    x = normal(4, 8)
    want = model(x).detach()
    plan = sc.plan(model, {"fc2": "2:4"})
    report = permute_(model, plan, fisher, [x], loss=lambda output, batch: output.square().mean())
    assert [row.layer for row in report.layers] == ["fc2"]
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "vit"])
def test_models_of_transformers_compute_the_same(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = {"vocab_size": 50, "max_position_embeddings": 32}
    torch.manual_seed(0)
    model, per_layer = {
        "llama": lambda: (
            transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**sizes, **text, num_key_value_heads=2)
            ),
            ("mlp.down_proj", "self_attn.o_proj"),
        ),
        "bert": lambda: (
            transformers.BertModel(transformers.BertConfig(**sizes, **text)),
            ("attention.output.dense", "output.dense"),
        ),
        "gpt2": lambda: (
            transformers.GPT2LMHeadModel(
                transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)
            ),
            ("mlp.c_proj",),
        ),
        "vit": lambda: (
            transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8)),
            ("fc2", "o_proj"),
        ),
    }[kind]()
    model = model.double().eval()
    batch = normal(2, 3, 16, 16) if kind == "vit" else torch.arange(24).view(2, 12)
    want = model(batch)[0].detach()
    layers = "*.c_proj" if kind == "gpt2" else nn.Linear  # not the patches' three channels
    plan = sc.plan(model, "2:4", layers=layers)
    report = permute_(model, plan, sc.wanda, [batch])
    torch.testing.assert_close(model(batch)[0], want, rtol=1e-10, atol=1e-10)
    assert len(report.layers) == 2 * len(per_layer), report
    assert all(row.layer.endswith(per_layer) for row in report.layers)
    assert all(row.kept > row.kept_before for row in report.layers)


def test_every_block_of_a_model_and_a_report_that_says_so() -> None:
    torch.manual_seed(0)
    model = Decoder(blocks=2)
    plan = sc.plan(model, {"*.down_proj": "2:4", "*.o_proj": "2:4", "*.up_proj": "block:4x4@0.5"})
    report = permute_(model, plan, sc.wanda, [torch.arange(12).view(2, 6)])
    assert [row.layer for row in report.layers] == ["blocks.0.down_proj", "blocks.1.down_proj"]
    assert report.left == {
        f"blocks.{i}.{name}": why
        for i in (0, 1)
        for name, why in {
            "attention.o_proj": f"no module around blocks.{i}.attention.v_proj says how wide a "
            "head is: head_dim, attention_head_size, key_value_proj_dim",
            "up_proj": "block:4x4@0.5 is no N:M pattern, and no other has groups of inputs to "
            "rearrange",
        }.items()
    }
    printed = str(report)
    assert "permuted the inputs of 2 layers" in printed and "2 layers: block:4x4@0.5" in printed
    assert report.to_dict()["layers"][0]["producers"] == ("blocks.0.up_proj",)


# --- what is refused -----------------------------------------------------------------------------


def left(model: nn.Module, layer: str, **options: Any) -> str:
    """Why the layer was left alone, once it is verified that nothing changed."""
    dense = state(model)
    plan = sc.plan(model, {layer: "2:4"})
    try:
        report: PermuteReport = permute_(model, plan, sc.magnitude, [normal(3, 8)], **options)
    except ValueError as error:
        reason = str(error)
    else:
        assert not report.layers
        reason = report.left[layer]
    assert not changed(model, dense)
    return reason


def test_what_sees_the_order_is_put_back() -> None:
    weighted = seeded(lambda: TwoLayers(lambda x: x * torch.arange(32, dtype=torch.float64)))
    assert "something sees the order" in left(weighted, "fc2")
    tapped = seeded(lambda: TwoLayers(tap=True))
    assert "something sees the order" in left(tapped, "fc2")


class Twice(nn.Module):
    """Two consumers of one producer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(x))
        return self.fc2(hidden) + self.fc3(hidden)


def test_a_producer_of_two_layers_is_refused() -> None:
    model = seeded(Twice)
    assert "something sees the order" in left(model, "fc2"), "by running it"
    with pytest.raises(ValueError, match="fc2: fc1 feeds 2 layers, which share one order"):
        permute_(
            model,
            sc.plan(model, {"fc2": "2:4", "fc3": "2:4"}),
            sc.magnitude,
            [normal(3, 8)],
            free=[*FREE, Free(("fc1",), "fc3")],
        )


def test_tied_weights_are_refused() -> None:
    class Tied(TwoLayers):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(8, 32)
            self.other.weight = self.fc1.weight

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.other(x).sum(-1, keepdim=True)

    assert "fc1: its weight or bias is tied" in left(seeded(Tied), "fc2")


def test_computed_weights_and_other_linears_are_refused() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).flip(-1)

    class Negative(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x

    model = seeded(TwoLayers)
    model.fc1 = Own(8, 32).double()
    assert "fc1: Own computes something else" in left(model, "fc2")
    model = seeded(TwoLayers)
    parametrize.register_parametrization(model.fc1, "weight", Negative())
    assert "fc1: its weight or bias is computed" in left(model, "fc2")


def test_inputs_that_are_not_free_are_refused() -> None:
    reason = left(seeded(GroupedQueries), "q_proj")
    assert "none of the 1 planned" in reason and "no name in free= makes its inputs" in reason
    model = seeded(GroupedQueries)
    model.head_dim = 2
    assert "2:4 has groups across heads of 2 inputs" in left(model, "o_proj")
    model.head_dim = 12
    assert "are not its 32 inputs in heads of 12" in left(model, "o_proj")


def test_another_pattern_is_refused() -> None:
    model = seeded(TwoLayers)
    plan = sc.plan(model, {"fc2": "unstructured:0.5"})
    with pytest.raises(ValueError, match="fc2: unstructured:0.5 is no N:M pattern"):
        permute_(model, plan, sc.magnitude, [normal(3, 8)])


def test_a_layer_that_does_not_run_first_is_left() -> None:
    class Sometimes(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    model = seeded(Sometimes)
    plan = sc.plan(model, {"fc2": "2:4"})
    report = permute_(model, plan, sc.magnitude, [-torch.ones(3, 8).double()])
    assert report.left["fc2"].startswith("it did not run for the first batch")


def test_a_layer_pruned_already_stays() -> None:
    model = seeded(TwoLayers)
    plan = sc.plan(model, {"fc2": "2:4"})
    sc.prune_(model, plan, sc.magnitude)
    assert left(model, "fc2") == "no order was found that keeps more"


def test_whatever_is_raised_nothing_is_changed() -> None:
    class Fragile(nn.Module):
        """The second MLP fails from the given run on."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = TwoLayers(), TwoLayers()
            self.runs, self.last = 0, 4

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            if self.runs >= self.last:
                raise KeyboardInterrupt
            return self.second(self.first(x))

    model = seeded(Fragile)
    dense = state(model)
    plan = sc.plan(model, {"*.fc2": "2:4"})
    with pytest.raises(KeyboardInterrupt):
        permute_(model, plan, sc.magnitude, [normal(3, 8)])
    assert model.runs == 4, "the first pair was done, the second permuted"
    assert not changed(model, dense)


def test_scores_and_batches_are_checked() -> None:
    model = seeded(TwoLayers)
    plan = sc.plan(model, {"fc2": "2:4"})
    dense = state(model)

    def infinite(weight: Tensor) -> Tensor:
        return torch.full_like(weight, float("inf"))

    with pytest.raises(ValueError, match="finite scores, fc2 has NaN"):
        permute_(model, plan, infinite, [normal(3, 8)])
    with pytest.raises(ValueError, match="at least one batch"):
        permute_(model, plan, sc.magnitude, [])
    with pytest.raises(ValueError, match="'pattern', which is no statistic"):
        permute_(model, plan, sc.sparsegpt, [normal(3, 8)])
    with pytest.raises(ValueError, match="made for another model"):
        permute_(seeded(Gated), plan, sc.magnitude, [normal(3, 8)])
    assert not changed(model, dense)
