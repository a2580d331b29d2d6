"""Calibration: what layers see, block by block, compared with hooks on the whole model."""

import contextlib
import copy
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.model.blocks import as_batch, run_batch
from secateur.model.calibrate import observe
from secateur.model.evaluate import compare
from secateur.model.layers import input_rows, select
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
    """Convolutions that read one input with different kernels and strides, as in a ResNet."""

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
    """A whole block at a time, it runs to be traced, recorded, checked, summed and passed on."""
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


class ByKeyword(nn.Module):
    """Passes its layers their input by keyword; two of them share it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(input=x) + self.second(input=x)
        out: Tensor = self.conv(input=y.view(-1, 2, 2, 2).repeat(1, 1, 2, 2))
        return out


@pytest.mark.parametrize("sequential", [False, True])
def test_layers_that_are_called_by_keyword_are_seen(sequential: bool) -> None:
    torch.manual_seed(0)
    model, batches = ByKeyword(), vectors()
    rows = torch.cat(batches)
    seen: dict[str, Tensor] = {}
    stages = []
    for observed in observe(model, select(model).layers, batches, ["gram"], sequential=sequential):
        stages.append(set(observed.statistics))
        seen |= {name: values["gram"] for name, values in observed.statistics.items()}
    torch.testing.assert_close(seen["first"], rows.T @ rows / len(rows))
    assert seen["second"] is seen["first"]
    y = (model.first(rows) + model.second(rows)).detach()
    windows = input_rows(model.conv, y.view(-1, 2, 2, 2).repeat(1, 1, 2, 2))
    torch.testing.assert_close(seen["conv"], windows.T @ windows / len(windows))
    assert stages == ([{"first", "second"}, {"conv"}] if sequential else [{*seen}])


def test_labels_beside_the_input_of_a_model_that_takes_one_are_left_out_with_a_warning() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 8))
    rows = [x.unflatten(1, (2, 4)) for x in vectors()]
    labels = torch.zeros(5, dtype=torch.long)
    with pytest.warns(UserWarning, match="which Sequential does not take: it runs on the"):
        (observed,) = observe(
            model, select(model).layers, [(x, labels) for x in rows], ["gram"], sequential=False
        )
    assert torch.equal(observed.statistics["1"]["gram"], grams_of_one(model, rows))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.cat(rows), torch.zeros(15)), batch_size=5
    )
    with pytest.warns(UserWarning, match="the labels are not read"):
        report = sc.prune_(model, "2:4", sc.wanda, loader)
    assert report.layers[0].tokens == 15


def grams_of_one(model: nn.Module, batches: Sequence[Any]) -> Tensor:
    (observed,) = observe(model, select(model).layers, batches, ["gram"], sequential=False)
    return observed.statistics["1"]["gram"]


def test_two_arguments_of_a_model_that_takes_two_are_no_labels() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            out: Tensor = self.layer(x * scale[:, None])
            return out

    model, x = Product(), vectors()[0]
    (observed,) = observe(
        model, select(model).layers, [(x, torch.full((5,), 2.0))], ["gram"], sequential=False
    )
    torch.testing.assert_close(observed.statistics["layer"]["gram"], 4 * x.T @ x / 5)
    with pytest.raises(ValueError, match="cannot run calibration batch 0, Tensor .5, 8.: .*scale"):
        list(observe(model, select(model).layers, [x], ["gram"], sequential=False))


class Masked(nn.Module):
    """Takes an optional second argument, and keeps what it got there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.got = nn.Linear(8, 8), list[Any]()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.got.append(mask)
        out: Tensor = self.layer(x)
        return out


class Labelled(Masked):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x, labels)


class Several(Masked):
    def forward(self, *args: Tensor) -> Tensor:
        return super().forward(*args)


CLASSES = torch.zeros(5, dtype=torch.long)


@pytest.mark.parametrize(
    ("kind", "second", "left_out"),
    [
        (Masked, CLASSES, True),
        (Masked, CLASSES.bool(), False),
        (Masked, CLASSES.float(), False),
        (Masked, CLASSES[:, None], False),
        (Masked, CLASSES[:4], False),
        (Labelled, CLASSES, False),
        (Several, CLASSES, False),
    ],
)
def test_class_numbers_are_no_mask(kind: type[Masked], second: Tensor, left_out: bool) -> None:
    """Labels are not handed to an argument that is for something else, and may be left out."""
    model = kind()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sc.prune_(model, "2:4", sc.wanda, [(vectors()[0], second)])
    assert all((got is None) == left_out for got in model.got) and model.got
    assert any("labels are not read" in str(one.message) for one in told) == left_out


def test_a_pair_that_a_model_cannot_run_says_what_labels_want() -> None:
    class Flagged(Masked):
        def forward(self, x: Tensor, flag: Any = False) -> Tensor:
            return x if flag else super().forward(x)

    with pytest.raises(ValueError, match="if what follows the first are labels, give batches wi"):
        sc.prune_(Flagged(), "2:4", sc.wanda, [(vectors()[0], CLASSES.float())])


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
    attention = [f"in_proj_weight.{name}" for name in "qkv"] + ["out_proj"]
    each = [*(f"self_attn.{name}" for name in attention), "linear1", "linear2"]
    assert list(plan.layers) == [f"layers.{i}.{name}" for i in (0, 1) for name in each]
    report = sc.reconstruct_(model, plan, sc.sparsegpt, [batch])
    assert [r.tokens for r in report.layers] == [10] * 12


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
    ids = tokens(1)[0]
    with pytest.raises(
        ValueError,
        match=r"run calibration batch 0, \{ids: Tensor \[2, 6\]\}: .*: leave out 'ids', which",
    ):
        run([{"ids": ids}])
    with pytest.raises(ValueError, match="leave out 'text', 'labels', which its forward does not"):
        run([{"input_ids": ids, "text": ["a", "b"], "labels": ids}])
    with pytest.raises(ValueError, match="'input_ids' is list: make it a tensor, or leave it out"):
        run([{"input_ids": ids.tolist()}])
    with pytest.raises(ValueError, match="calibration batch 1 is None.*: a batch is a tensor, a"):
        run([ids, None])
    with pytest.raises(ValueError, match="calibration batch 0 is str: a batch is a tensor, a tup"):
        run(["text"])
    with pytest.raises(ValueError, match="batch 0, Tensor .2, 6., is on the meta device, which ho"):
        run([ids.to("meta")])
    with pytest.raises(ValueError, match=r"\(Tensor .2, 6., NoneType\), is on the meta device"):
        run([(ids.to("meta"), None)])


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
    with pytest.raises(ValueError, match="batch 2 is .*: a batch is a tensor, a tuple of pos"):
        as_batch(batch, "batch 2")


@pytest.mark.filterwarnings("ignore:batches are pairs")
def test_every_verb_runs_pairs_of_inputs_and_labels() -> None:
    """Even those that train the whole model, and estimate the cost by running a part of it."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    pairs = [(x, torch.zeros(5, dtype=torch.long)) for x in vectors()]
    found, expected = copy.deepcopy(dense), copy.deepcopy(dense)
    sc.reconstruct_(found, "2:4", sc.thorough, pairs)
    sc.reconstruct_(expected, "2:4", sc.thorough, vectors())
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    sc.distil_(found, dense, pairs, steps=2)
    sc.distil_(expected, dense, vectors(), steps=2)
    assert torch.equal(found[0].weight, expected[0].weight)
    assert compare(found, dense, pairs) == compare(expected, dense, vectors())


@pytest.mark.parametrize("length", [16, 64])
@pytest.mark.parametrize(
    ("verb", "method"),
    [(sc.prune_, sc.wanda), (sc.reconstruct_, sc.sparsegpt)],
    ids=["wanda", "gpt"],
)
def test_token_ids_are_no_activations(verb: Any, method: Any, length: int) -> None:
    """Even if there are as many as the embedding is wide."""
    model = nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 64))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = [torch.randint(0, 96, (4, length)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"0 is an embedding, .*: leave it out of the plan"):
        verb(model, sc.plan(model, "2:4", layers=["0"]), method, ids)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    sc.prune_(model, sc.plan(model, "2:4", layers=["0"]))
    assert sc.check(model, sc.plan(model, "2:4", layers=["0"])) == {"0": 0.5}
