"""Calibration: what layers see, block by block, held to plain hooks on the whole model."""

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.calibrate import observe
from secateur.layers import input_rows, select
from secateur.replay import run_batch, usable
from tests.models import Caching, ConvNet, Decoder, Experts, Unchained


def tokens(count: int = 3, rows: int = 2, length: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, (rows, length), generator=generator) for _ in range(count)]


def grams(model: nn.Module, batches: Sequence[Any]) -> dict[str, Tensor]:
    """The Gram matrix of every layer's input in float64, by plain hooks on the whole model."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: seen.setdefault(name, []).append(input_rows(m, args[0]))
        )
        for name, module in select(model).layers.items()
    ]
    model.eval()
    with torch.no_grad():
        for batch in batches:
            run_batch(model, batch)
    for handle in handles:
        handle.remove()
    rows = {name: torch.cat(x).double() for name, x in seen.items()}
    return {name: x.T @ x / len(x) for name, x in rows.items()}


def prune_by_hand(model: nn.Module, name: str) -> None:
    """Halve the weights of a layer, so that what comes after it visibly changes."""
    model.get_submodule(name).weight.data.mul_(0.5)


def images(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 10, 10, generator=generator) for _ in range(count)]


def vectors(width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, width, generator=generator) for _ in range(3)]


class Branches(nn.Module):
    """Convolutions that read one input by different kernels and strides, as a ResNet's shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.same = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.strided, self.shortcut = nn.Conv2d(4, 6, 3, 2, padding=1), nn.Conv2d(4, 6, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        small = self.strided(x) + self.shortcut(x)
        return (self.conv(x) + self.same(x))[..., ::2, ::2] + small


CASES = [
    pytest.param(Branches, images(), id="branches"),
    pytest.param(Decoder, tokens(), id="decoder"),
    pytest.param(ConvNet, images(), id="conv"),
    pytest.param(Unchained, vectors(), id="unchained"),
    pytest.param(Caching, vectors(), id="caching"),
    pytest.param(Experts, vectors(), id="experts"),
    pytest.param(
        lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)), vectors(), id="mlp"
    ),
    pytest.param(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), vectors(), id="linears"),
]


@pytest.mark.parametrize(("make", "batches"), CASES)
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_every_layer_sees_what_hooks_on_the_whole_model_see(
    make, batches, sequential: bool, offload: bool
) -> None:
    torch.manual_seed(0)
    model = make()
    expected = grams(model, batches)
    layers = select(model).layers
    seen: dict[str, Tensor] = {}
    for observed in observe(
        model, layers, batches, ["gram"], sequential=sequential, offload=offload
    ):
        seen |= {name: values["gram"] for name, values in observed.statistics.items()}
    assert seen.keys() == expected.keys()
    for name, gram in seen.items():
        torch.testing.assert_close(gram.double(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "batches"), CASES)
def test_sequentially_every_layer_sees_what_the_changed_ones_before_it_make(make, batches) -> None:
    torch.manual_seed(0)
    model = make()
    layers = select(model).layers
    with contextlib.closing(observe(model, layers, batches, ["gram"], sequential=True)) as source:
        for observed in source:
            expected = grams(model, batches)
            for name, values in observed.statistics.items():
                torch.testing.assert_close(
                    values["gram"].double(), expected[name], rtol=1e-4, atol=1e-5
                )
            for name in observed.statistics:
                prune_by_hand(model, name)


def test_layers_that_share_an_input_come_together_and_share_one_gram() -> None:
    model = Decoder()
    stages = [
        sorted(name.split(".")[-1] for name in observed.statistics)
        for observed in observe(model, select(model).layers, tokens(), ["gram"], sequential=True)
    ]
    one_block = [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["up_proj"], ["down_proj"]]
    assert stages == one_block * 3
    observed = next(observe(model, select(model).layers, tokens(), ["gram"], sequential=False))
    prefix = "blocks.0.attention."
    assert (
        observed.statistics[prefix + "q_proj"]["gram"]
        is observed.statistics[prefix + "v_proj"]["gram"]
    )
    assert set(observed.tokens.values()) == {3 * 2 * 6}


def test_one_block_runs_at_a_time() -> None:
    """Without pruning stage by stage a block runs: traced, recorded, checked, summed, passed on."""
    model, batches = Decoder(blocks=4), tokens(3)
    for _ in observe(model, select(model).layers, batches, ["input_norm"], sequential=False):
        pass
    runs = [block.forwards for block in model.blocks]
    traced, recorded, checked, summed, passed_on = 1, 3, 1, 3, 3
    assert runs == [traced + recorded + checked + summed + passed_on] * 3 + [
        traced + recorded + checked + summed
    ]


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    model = Decoder()
    ids = tokens(1, rows=1, length=5)[0]
    padded = {
        "input_ids": torch.cat([ids, torch.full((1, 3), 7)], 1),
        "attention_mask": torch.tensor([[1] * 5 + [0] * 3]),
    }
    layers = select(model).layers

    def norms(batch: Any) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        for observed in observe(model, layers, [batch], ["input_norm"], sequential=False):
            assert set(observed.tokens.values()) == {5}
            seen |= {n: s["input_norm"] for n, s in observed.statistics.items()}
        return seen

    expected, found = norms(ids), norms(padded)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_batches_may_be_tensors_tuples_and_dicts() -> None:
    model, ids = Decoder(), tokens(1)[0]
    seen = []
    for batch in (ids, (ids,), [ids], {"input_ids": ids}):
        observed = next(
            observe(model, select(model).layers, iter([batch]), ["input_norm"], sequential=False)
        )
        seen.append(observed.statistics["blocks.0.up_proj"]["input_norm"])
    assert all(torch.equal(seen[0], other) for other in seen[1:])


def test_the_model_is_left_in_its_mode_also_when_the_walk_is_abandoned() -> None:
    model = Decoder().train()
    model.blocks[1].eval()
    source = observe(model, select(model).layers, tokens(), ["gram"], sequential=True)
    next(source)
    assert not model.training
    source.close()
    assert model.training and model.blocks[0].training and not model.blocks[1].training
    assert torch.is_grad_enabled()
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


def test_a_torch_transformer_encoder_is_seen_past_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    batch = torch.randn(2, 5, 8)
    plan = sc.plan(model, "2:4")
    assert list(plan.layers) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    report = sc.reconstruct_(model, plan, sc.sparsegpt, [batch])
    assert [r.tokens for r in report.layers] == [10] * 4


def test_wrong_data_says_what_is_wrong(unchecked: None) -> None:
    model = Decoder()
    layers = select(model).layers

    def run(batches: Any, model: nn.Module = model) -> None:
        for _ in observe(model, layers, batches, ["gram"], sequential=True):
            pass

    with pytest.raises(ValueError, match="needs at least one batch, got none"):
        run([])
    with pytest.raises(ValueError, match=r"got one Tensor: wrap it in a list, or split it"):
        run(torch.zeros(4, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="got one dict"):
        run({"input_ids": tokens(1)[0]})
    with pytest.raises(ValueError, match=r"Decoder cannot run calibration batch 0, Tensor \[2\]: "):
        run([torch.zeros(2, dtype=torch.long)])
    with pytest.raises(
        ValueError, match=r"cannot run calibration batch 0, \{ids: Tensor \[2, 6\]\}"
    ):
        run([{"ids": tokens(1)[0]}])


def test_a_layer_that_sees_nothing_is_named() -> None:
    model = Experts()
    batches = [torch.ones(4, 8) * 0.25]
    with pytest.raises(ValueError, match=r"layer experts.0 \(and 2 more\) received 0 tokens"):
        list(observe(model, select(model).layers, batches, ["gram"], sequential=False))


def test_an_expert_that_only_a_later_batch_reaches_is_seen() -> None:
    model = Experts()
    batches = [torch.ones(4, 8) * i / 10 for i in range(4)]
    (observed,) = observe(model, select(model).layers, batches, ["gram"], sequential=False)
    assert observed.tokens == {f"experts.{i}": 4 for i in range(4)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(bad: float) -> None:
    model = Decoder()
    model.blocks[1].norm2.bias.data[3] = bad
    with pytest.raises(ValueError, match=r"layer blocks.1.up_proj received NaN or infinite"):
        list(observe(model, select(model).layers, tokens(), ["gram"], sequential=True))


@pytest.mark.parametrize("batch", [None, 3.0, "text", {1, 2}], ids=repr)
def test_what_is_no_batch_is_named(batch: object) -> None:
    with pytest.raises(ValueError, match="batch 2 is .*: a batch is a tensor, a tuple of arg"):
        usable(batch, 2)
