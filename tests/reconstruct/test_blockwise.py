"""Half-block reconstruction: where halves are cut, and what training them may and may not do."""

import copy
import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.model import layers
from secateur.model.calibrate import observe
from secateur.model.half_blocks import HalfBlock, find_cuts
from secateur.model.layers import select, weight_of
from secateur.model.plan import match
from secateur.model.statistics import name_of
from secateur.patterns import Int2, Int3, Pattern
from secateur.patterns.grids import Grid
from secateur.reconstruct import Blockwise, Solution, blockwise
from secateur.reconstruct.blockwise import EPOCHS
from tests.captures import stand_in
from tests.inside import KINDS, output, problem
from tests.models import Block, Caching, ConvNet, Decoder

module = importlib.import_module("secateur.reconstruct.blockwise")


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder()


def tokens(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(20, (4, 12), generator=generator) for _ in range(count)]


def images(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 4, 8, 8, generator=generator) for _ in range(count)]


def first_half(model: nn.Module, batches: list[Any]) -> HalfBlock:
    source = observe(model, select(model).layers, batches, [], sequential=True, halves=True)
    half = next(observed.half for observed in source if observed.half is not None)
    source.close()
    return half


def errors(report: Any) -> dict[str, tuple[float, float]]:
    """Each half-block's held-out error before and after, from the notes."""
    pattern = r"([^;]+): held-out error (\S+) before training, (\S+) after"
    found = [re.search(pattern, row.note) for row in report.layers]
    return {m[1].strip(): (float(m[2]), float(m[3])) for m in found if m}


def zeroed(weight: Tensor, pattern: Any) -> Solution:
    """The large weights, unchanged: a start that leaves something to learn."""
    mask = pattern.mask(weight.abs())
    return Solution(weight * mask, mask)


# --- where a block is cut ------------------------------------------------------------------------


def cuts(block: nn.Module, layers: list[str], *args: Tensor) -> list[tuple[tuple[str, ...], Any]]:
    found = find_cuts(block, layers, (args, {}))
    return [(names, end and end.module) for names, end in found]


ATTENTION = tuple(f"attention.{x}_proj" for x in "qkvo")


def test_a_transformer_block_is_cut_at_the_residual_stream() -> None:
    mlp = ("up_proj", "down_proj")
    found = cuts(Block(16), [*ATTENTION, *mlp], torch.randn(2, 5, 16))
    assert found == [(ATTENTION, "norm2"), (mlp, None)]
    found = cuts(Block(16), ["attention.o_proj", "down_proj"], torch.randn(2, 5, 16))
    assert found == [(("attention.o_proj",), "norm2"), (("down_proj",), None)]


def test_a_token_of_zeros_hides_no_other_path() -> None:
    """A norm of zeros has a gradient of 1 / sqrt(eps): class tokens often start as zeros."""
    layer, mlp = Block(16), ("up_proj", "down_proj")
    layer.norm1.eps = 1e-12
    x = torch.randn(2, 5, 16)
    x[:, 0] = 0
    assert cuts(layer, [*ATTENTION, *mlp], x) == [(ATTENTION, "norm2"), (mlp, None)]


class Parallel(Block):
    """Attention and MLP read the same norm: the MLP's input is no cut."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = self.norm1(x)
        return x + self.attention(y, None) + self.down_proj(self.up_proj(y))


class PostNorm(Block):
    """Norms after the sums, as in BERT."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = self.norm1(x + self.attention(x, None))
        return self.norm2(x + self.down_proj(self.up_proj(x)))


class Sandwich(Block):
    """A norm of the attention's output before the sum, as in Gemma 2: it is no cut."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.norm3(self.attention(self.norm1(x), None))
        return x + self.down_proj(self.up_proj(self.norm2(x)))


class Again(Block):
    """A layer of the attention runs again in the MLP, so it cannot be trained before that."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.attention(self.norm1(x), None)
        y = self.attention.o_proj(self.norm2(x))
        return x + self.down_proj(self.up_proj(y))


def test_other_blocks_are_cut_where_everything_passes_through_or_nowhere() -> None:
    x, mlp = torch.randn(2, 5, 16), ("up_proj", "down_proj")
    assert cuts(Parallel(16), [*ATTENTION, *mlp], x) == [((*ATTENTION, *mlp), None)]
    assert cuts(PostNorm(16), [*ATTENTION, *mlp], x) == [(ATTENTION, "norm1"), (mlp, None)]
    assert cuts(Sandwich(16), [*ATTENTION, *mlp], x) == [(ATTENTION, "norm2"), (mlp, None)]
    assert cuts(Again(16), [*ATTENTION, *mlp], x) == [((*ATTENTION, *mlp), None)]
    net = ConvNet().stage1[0].eval()
    whole = [(("conv1", "conv2"), None)]
    assert cuts(net, ["conv1", "conv2"], torch.randn(2, 8, 6, 6)) == whole
    assert cuts(nn.Linear(4, 4), [""], torch.randn(2, 4)) == [(("",), None)]


def test_what_a_half_block_gives_is_the_stream_behind_it() -> None:
    model, batches = decoder().eval(), tokens()
    x = model.embed(batches[1])
    layer = model.blocks[0]
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    stream = x + layer.attention(layer.norm1(x), mask)
    half = first_half(model, batches)
    assert [*half.layers] == [f"blocks.0.{name}" for name in ATTENTION]
    torch.testing.assert_close(half.targets[1], stream.detach())
    weights = {name: weight_of(model.get_submodule(name)).detach() for name in half.layers}
    weights = {name: (w / 2).requires_grad_() for name, w in weights.items()}
    output = half.output(1, weights)
    assert not torch.allclose(output, stream)
    output.sum().backward()
    assert all(w.grad is not None for w in weights.values())
    assert all(p.grad is None for p in model.parameters())


def test_targets_are_the_dense_models_and_inputs_the_pruned_ones() -> None:
    """The targets of all blocks, while each block is destroyed as it is passed."""
    model, batches = decoder(), tokens(2)
    dense = copy.deepcopy(model).eval()
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    expected = [dense.embed(batches[0])]
    for layer in dense.blocks:
        expected.append(layer(expected[-1], mask=mask)[0])
    ends: dict[str, HalfBlock] = {}
    layers = select(model).layers
    for observed in observe(model, layers, batches, [], sequential=True, halves=True):
        if observed.half is not None:
            ends[observed.half.name] = observed.half
        for name in observed.statistics:
            weight_of(layers[name]).data.mul_(0.5)
    assert list(ends) == [f"blocks.{i} ({j} of 2)" for i in range(3) for j in (1, 2)]
    for i in range(3):
        torch.testing.assert_close(ends[f"blocks.{i} (2 of 2)"].targets[0], expected[i + 1])


# --- what training does --------------------------------------------------------------------------


CASES = [
    pytest.param(decoder, tokens, id="decoder"),
    pytest.param(ConvNet, images, id="conv"),
]


@pytest.mark.parametrize(("make", "data"), CASES)
@pytest.mark.parametrize("method", [zeroed, sc.wanda], ids=name_of)
def test_held_out_errors_fall_and_zeros_stay(
    make: Callable[[], nn.Module], data: Callable[[], list[Tensor]], method: Any
) -> None:
    torch.manual_seed(0)
    model = make()
    dense = copy.deepcopy(model)
    plan = sc.plan(model, "2:4", ignore=["stem"] if isinstance(model, ConvNet) else [])
    quick = sc.blockwise(method, learning_rate=0.02)
    report = sc.reconstruct_(model, plan, quick, data())
    found = errors(report)
    assert len(found) == (6 if isinstance(model, Decoder) else 4)
    assert all(after <= before for before, after in found.values())
    assert sum(after < 0.99 * before for before, after in found.values()) >= len(found) / 2
    sparsity = sc.check(model, plan)
    assert set(sparsity.values()) == {0.5}
    planned = {f"{name}.weight" for name in plan.layers}
    for (name, before), after in zip(dense.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after) == (name not in planned)
        assert after.grad is None and after.requires_grad


def test_the_model_is_closer_to_the_dense_one_than_layer_by_layer_on_new_data() -> None:
    batches, new = tokens(12), tokens(16)[12:]
    lost = []
    for method in (sc.refit(sc.wanda), sc.blockwise(sc.wanda, learning_rate=0.03)):
        model = decoder().eval()
        dense = copy.deepcopy(model)
        sc.reconstruct_(model, "2:4", method, batches)
        with torch.no_grad():
            lost.append(sum(float((model(x) - dense(x)).square().sum()) for x in new))
    assert lost[1] < 0.9 * lost[0]


def test_the_note_says_the_held_out_error_worked_out_by_hand() -> None:
    """The only half-block is the linear layer of the last block; the second batch is held out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    dense = copy.deepcopy(model)
    batches = [torch.randn(40, 8) for _ in range(3)]
    plan = sc.plan(model, "2:4", ignore=["0.0"])
    long = sc.blockwise(zeroed, epochs=10, learning_rate=0.05)
    report = sc.reconstruct_(model, plan, long, batches)
    with torch.no_grad():
        target = [dense(x) for x in batches]
        error = (model(batches[1]) - target[1]).square().mean()
        expected = error / torch.cat(target).var(correction=0)
    ((before, after),) = errors(report).values()
    assert after == pytest.approx(float(expected), rel=1e-3)  # as many digits as the note has
    assert after < before


def test_the_start_is_kept_where_training_does_not_help() -> None:
    """A learning rate that destroys every weight."""
    plain, model = decoder(), decoder()
    before = sc.reconstruct_(plain, "2:4", sc.refit(sc.wanda), tokens())
    worse = sc.blockwise(sc.wanda, learning_rate=100.0)
    report = sc.reconstruct_(model, "2:4", worse, tokens())
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(first == last for first, last in errors(report).values())
    assert [r.error for r in report.layers] == [r.error for r in before.layers]


def test_the_output_error_of_trained_layers_is_not_known_any_more() -> None:
    report = sc.reconstruct_(decoder(), "2:4", sc.blockwise(sc.wanda), tokens())
    trained = {name for name, (before, after) in errors(report).items() if after < before}
    assert trained
    for row in report.layers:
        part = "1 of 2" if "attention" in row.layer else "2 of 2"
        half = f"{row.layer[:8]} ({part})"
        assert (row.error is None) == (half in trained)


@pytest.mark.parametrize("offload", [False, True])
def test_it_is_deterministic_and_offloading_changes_nothing(offload: bool) -> None:
    one, other = decoder(), decoder()
    sc.reconstruct_(one, "2:4", sc.blockwise(sc.wanda), tokens())
    sc.reconstruct_(other, "2:4", sc.blockwise(sc.wanda), tokens(), offload=offload)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("grid", [None, sc.Int4(16)], ids=repr)
def test_replayed_steps_are_the_steps(grid: Grid | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, in half-blocks and in the whole model; the last batch is a shorter one."""
    dense, batches = decoder(), [*tokens(12), tokens(1)[0][:2]]
    method = blockwise(sc.alps, epochs=2, distil=2, grid=grid)
    called, replayed = copy.deepcopy(dense), copy.deepcopy(dense)
    sc.reconstruct_(called, "2:4", method, batches)
    replays = stand_in(monkeypatch)
    sc.reconstruct_(replayed, "2:4", method, batches)
    assert all(map(torch.equal, called.parameters(), replayed.parameters()))
    assert len(replays) >= 5 and max(replays) > 10


def test_a_half_precision_model_is_trained_in_float32_and_stays_as_it_is() -> None:
    model = decoder().bfloat16()
    report = sc.reconstruct_(model, "2:4", sc.blockwise(sc.wanda), tokens())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert set(sc.check(model, "2:4").values()) == {0.5}
    # Steps of 1e-5 of a weight, lost in bfloat16, add up in float32.
    assert sum(after < before for before, after in errors(report).values()) >= 3


def test_padding_does_not_count() -> None:
    """The tokens at padded positions make no difference to what is learnt."""
    learnt = []
    for filler in (0, 7):
        model = decoder()
        batches = [
            {
                "input_ids": torch.cat([ids, torch.full((4, 4), filler)], 1),
                "attention_mask": torch.tensor([[1] * 12 + [0] * 4]).expand(4, -1),
            }
            for ids in tokens()
        ]
        sc.reconstruct_(model, "2:4", sc.blockwise(sc.wanda), batches)
        learnt.append(model.blocks[2].down_proj.weight)
    torch.testing.assert_close(learnt[0], learnt[1], rtol=1e-3, atol=1e-4)


class Mixture(nn.Module):
    """Blocks with two experts; a token takes one by the sign of its first number."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MixtureBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for mixture in self.blocks:
            x = mixture(x)
        return x


class MixtureBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 7) for _ in range(2))
        self.reads = True

    def forward(self, x: Tensor) -> Tensor:
        sign = x[:, :1]
        y = torch.zeros_like(x[:, 1:])
        for i, expert in enumerate(self.experts):
            (chosen,) = ((sign[:, 0] > 0) == bool(i)).nonzero(as_tuple=True)
            if len(chosen):
                y = y.index_add(0, chosen, expert(x[chosen]))
        return torch.cat([sign, x[:, 1:] + y if self.reads else x[:, 1:]], 1)


def routed(*to_second: bool) -> list[Tensor]:
    """Batches whose tokens all go to the same one of the two experts."""
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(64, 8, generator=generator) for _ in to_second]
    for x, second in zip(batches, to_second, strict=True):
        x[:, 0] = x[:, 0].abs() if second else -x[:, 0].abs()
    return batches


def test_an_expert_that_no_trained_batch_reaches_stays_as_the_method_left_it() -> None:
    """The second batch is held out; only the other expert gets gradients."""
    torch.manual_seed(0)
    model = Mixture()
    report = sc.reconstruct_(model, "2:4", sc.blockwise(zeroed), routed(False, True, False))
    left = {row.layer for row in report.layers if row.error is None}
    assert left == {f"blocks.{i}.experts.{j}" for i in (0, 1) for j in (0, 1)}
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(after <= before for before, after in errors(report).values())
    torch.manual_seed(0)
    start = Mixture()
    sc.prune_(start, "2:4", sc.magnitude)
    for found, other in zip(model.blocks, start.blocks, strict=True):
        assert torch.equal(found.experts[1].weight, other.experts[1].weight)


def test_an_expert_that_no_batch_reaches_is_named_and_nothing_is_changed() -> None:
    model = Mixture()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layer blocks.0.experts.1 .* received 0 tokens"):
        sc.reconstruct_(model, "2:4", sc.blockwise(sc.alps), routed(False, False, False))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_block_that_gives_nothing_of_its_layers_is_not_trained() -> None:
    model = Mixture()
    for mixture in model.blocks:
        mixture.reads = False
    report = sc.reconstruct_(model, "2:4", sc.blockwise(sc.alps), routed(True, False, True, False))
    assert set(errors(report).values()) == {(0.0, 0.0)}
    assert set(sc.check(model, "2:4").values()) == {0.5}
    assert all(p.isfinite().all() for p in model.parameters())


def test_layers_outside_a_chain_are_as_the_method_left_them() -> None:
    torch.manual_seed(0)
    model = Caching()
    batches = [torch.randn(5, 8) for _ in range(3)]
    plain = copy.deepcopy(model)
    sc.reconstruct_(plain, "2:4", sc.alps, batches)
    report = sc.reconstruct_(model, "2:4", sc.blockwise(sc.alps), batches)
    assert not errors(report)
    assert torch.equal(model.blocks[1].linear.weight, plain.blocks[1].linear.weight)


# --- on a grid -----------------------------------------------------------------------------------


def on_grid(grid: Grid, model: nn.Module, plan: sc.Plan) -> bool:
    """Whether every planned weight is scale x code for scales that the grid finds, to the bit."""
    for layer in match(model, plan).values():
        weight = layers.matrix(layer).detach().contiguous()
        scales = grid.scales(weight)
        again = grid.dequantised(grid.codes(weight, scales), scales).to(weight.dtype)
        if not torch.equal(again, weight):
            return False
    return True


PATTERNS = (
    sc.NM(2, 4),
    sc.NM(1, 4),
    sc.Unstructured(0.6),
    sc.Block(4, 4, 0.5),
    sc.Channel(0.25, "in"),
    sc.Unstructured(0.0),
)
GRIDS = (sc.Int4(8), sc.Int4(None), sc.Int8(), sc.Fp8(), Int3(8), Int2())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_every_pattern_ends_on_every_grid_with_its_zeros(grid: Grid, pattern: Pattern) -> None:
    """Where dense weights or 2:4 are to be rounded, the whole model is trained, and in 16 bits."""
    whole = pattern in (sc.NM(2, 4), sc.Unstructured(0.0))
    model = decoder().to(torch.bfloat16 if whole else torch.float32)
    plan = sc.plan(model, pattern, ignore=["lm_head"])
    method = WHOLE(grid) if whole else sc.blockwise(sc.wanda, epochs=1, grid=grid)
    report = sc.reconstruct_(model, plan, method, tokens(3))
    sc.check(model, plan)
    assert on_grid(grid, model, plan)
    distil = ", distil=1" if whole else ""
    assert report.method == f"blockwise(refit(wanda), epochs=1{distil}, grid={grid!r})"


def WHOLE(grid: Grid) -> Blockwise:
    return sc.blockwise(sc.wanda, epochs=1, distil=1, grid=grid)


@pytest.mark.parametrize(("make", "data"), CASES)
def test_convolutions_too(make: Callable[[], nn.Module], data: Callable[..., list[Tensor]]) -> None:
    torch.manual_seed(0)
    model = make()
    plan = sc.plan(model, "2:4", ignore=["stem"] if isinstance(model, ConvNet) else [])
    sc.reconstruct_(model, plan, sc.blockwise(sc.alps, distil=1, grid=sc.Int4(16)), data(9))
    sc.check(model, plan)
    assert on_grid(sc.Int4(16), model, plan)


def test_packing_finds_the_grid_and_loses_nothing() -> None:
    for grid, format in (
        (sc.Int4(), "semi24_int4"),
        (sc.Int4(None), "semi24_int4:channel"),
        (sc.Int8(), "semi24_int8"),
        (sc.Fp8(), "semi24_fp8"),
    ):
        model = decoder()
        plan = sc.plan(model, "2:4", ignore=["lm_head"])
        sc.reconstruct_(model, plan, WHOLE(grid), tokens(3))
        before = copy.deepcopy(model.state_dict())
        packed = sc.pack_(model, format)
        assert packed.weight_error <= torch.finfo(torch.float32).eps
        sc.unpack_(model)
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_half_blocks_lose_less_than_rounding_what_was_trained_without_a_grid() -> None:
    """On new batches, and less than the method's own rounding layer by layer."""
    lost: dict[str, float] = {}
    for name, method in (
        ("free", sc.blockwise(sc.alps)),
        ("rounded after", sc.blockwise(sc.alps)),
        ("layer by layer", partial(sc.alps, grid=Int3(16))),
        ("on the grid", sc.blockwise(sc.alps, grid=Int3(16))),
    ):
        model = decoder().eval()
        dense, plan = copy.deepcopy(model), sc.plan(model, "2:4", ignore=["lm_head"])
        sc.reconstruct_(model, plan, method, tokens(12))
        if name == "rounded after":
            for layer in plan.layers:
                weight = weight_of(model.get_submodule(layer)).data
                scales = Int3(16).scales(weight)
                weight.copy_(Int3(16).dequantised(Int3(16).codes(weight, scales), scales))
        with torch.no_grad():
            new = tokens(16)[12:]
            lost[name] = sum(float((model(x) - dense(x)).square().sum()) for x in new)
    assert lost["free"] < lost["on the grid"] < lost["layer by layer"]
    gap = lost["rounded after"] - lost["free"]
    assert lost["on the grid"] - lost["free"] < 0.6 * gap


def test_the_note_says_the_error_on_the_grid_worked_out_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    dense = copy.deepcopy(model)
    batches = [torch.randn(40, 8) for _ in range(3)]
    plan = sc.plan(model, "2:4", ignore=["0.0"])
    report = sc.reconstruct_(model, plan, sc.blockwise(zeroed, grid=Int2()), batches)
    with torch.no_grad():
        target = [dense(x) for x in batches]
        error = (model(batches[1]) - target[1]).square().mean()
        expected = error / torch.cat(target).var(correction=0)
    ((_, after),) = errors(report).values()
    assert after == pytest.approx(float(expected), rel=1e-3)
    assert on_grid(Int2(), model, plan)


def test_training_that_does_not_help_leaves_what_rounding_gave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At learning rates that destroy every weight, off the grid and on it."""
    rounding: list[dict[str, Tensor]] = []
    round_ = module._Training.round_

    def seen(self: Any, grid: Grid) -> None:
        round_(self, grid)
        rounding.append({n: w.detach().clone() for n, w in self.stored().items()})

    monkeypatch.setattr(module._Training, "round_", seen)
    model = decoder()
    sc.reconstruct_(
        model, "2:4", sc.blockwise(sc.wanda, learning_rate=100.0, grid=sc.Int4(8)), tokens()
    )
    found = {name: w for half in rounding for name, w in half.items()}
    assert len(found) == 18
    for name, weight in found.items():
        assert torch.equal(weight_of(model.get_submodule(name)), weight), name


def test_grams_are_those_that_calibration_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all batches, for layers of a half-block at once, padding left out."""
    model, batches = decoder(), tokens()
    padded = [
        {
            "input_ids": torch.cat([ids, torch.full((4, 4), 7)], 1),
            "attention_mask": torch.tensor([[1] * 12 + [0] * 4]).expand(4, -1),
        }
        for ids in batches
    ]
    planned = select(model).layers
    expected = {
        name: statistics["gram"]
        for observed in observe(model, planned, batches, ["gram"], sequential=False)
        for name, statistics in observed.statistics.items()
    }
    for data in (batches, padded):
        half = first_half(model, data)
        masks = {n: torch.ones_like(weight_of(planned[n]), dtype=torch.bool) for n in half.layers}
        found = module._Training(half, masks, module.ALONE)._grams()
        assert set(found) == set(half.layers)
        for name, gram in found.items():
            torch.testing.assert_close(gram, expected[name])


def test_layers_outside_a_chain_are_rounded_by_the_method() -> None:
    batches = [torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for method, alone in (
        (sc.alps, partial(sc.alps, grid=sc.Int4(4))),
        (sc.wanda, sc.refit(sc.wanda, grid=sc.Int4(4))),
        (zeroed, sc.refit(zeroed, grid=sc.Int4(4))),
    ):
        torch.manual_seed(0)
        model = Caching()
        plain = copy.deepcopy(model)
        sc.reconstruct_(plain, "2:4", alone, batches)
        report = sc.reconstruct_(model, "2:4", sc.blockwise(method, grid=sc.Int4(4)), batches)
        assert not errors(report)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, other)


def test_on_a_grid_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def method(after: int) -> Blockwise:
        return sc.blockwise(interrupting(after), epochs=2, grid=sc.Int4(8))

    whole, model = decoder(), decoder()
    before = copy.deepcopy(model.state_dict())
    expected = sc.reconstruct_(whole, "2:4", method(99), tokens())
    with pytest.raises(KeyboardInterrupt):
        sc.reconstruct_(model, "2:4", method(11), tokens(), checkpoint=tmp_path / "run")
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match="another run, its method differs"):
        other = sc.blockwise(interrupting(99), epochs=2, grid=sc.Int4(4))
        sc.reconstruct_(model, "2:4", other, tokens(), checkpoint=tmp_path / "run")
    report = sc.reconstruct_(model, "2:4", method(8), tokens(), checkpoint=tmp_path / "run")
    assert report.layers == expected.layers
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_grid_that_a_weights_dtype_has_no_scales_for_is_refused() -> None:
    model = decoder().double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"layer blocks\.0\.\S+: Int4\(.*\) needs a float32, .*float64"
    ):
        sc.reconstruct_(model, "2:4", sc.blockwise(sc.alps, grid=sc.Int4()), tokens())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


# --- a verb like the others ----------------------------------------------------------------------


def interrupting(after: int) -> Callable[..., Solution]:
    calls = []

    def sparsegpt(weight: Tensor, gram: Tensor, pattern: Any) -> Solution:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return sc.sparsegpt(weight, gram, pattern)

    return sparsegpt


def test_an_interrupted_run_leaves_the_model_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Stopped in the second half of the second block: the first half is not trained again."""
    whole, model = decoder(), decoder()
    before = copy.deepcopy(model.state_dict())
    expected = sc.reconstruct_(whole, "2:4", sc.blockwise(interrupting(99)), tokens())
    with pytest.raises(KeyboardInterrupt):
        sc.reconstruct_(
            model, "2:4", sc.blockwise(interrupting(11)), tokens(), checkpoint=tmp_path / "run"
        )
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    rest = interrupting(18 - 10)  # 10 layers are in three half-blocks
    report = sc.reconstruct_(
        model, "2:4", sc.blockwise(rest), tokens(), checkpoint=tmp_path / "run"
    )
    assert report.layers == expected.layers
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_training_that_is_interrupted_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    before = copy.deepcopy(model.state_dict())
    step = torch.optim.Adam.step
    steps = []

    def interrupted(self: Any, closure: Any = None) -> Any:
        steps.append(1)
        if len(steps) == 30:
            raise KeyboardInterrupt
        return step(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sc.reconstruct_(model, "2:4", sc.blockwise(sc.wanda), tokens())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.is_grad_enabled()
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_it_is_named_with_its_options() -> None:
    assert sc.blockwise(sc.alps).name == "blockwise(alps)"
    assert sc.blockwise(sc.wanda).name == "blockwise(refit(wanda))"
    named = sc.blockwise(sc.alps, epochs=EPOCHS + 1, learning_rate=0.5)
    assert named.name == f"blockwise(alps, epochs={EPOCHS + 1}, learning_rate=0.5)"


def test_wrong_calls_are_refused_before_anything(unchecked: None) -> None:
    with pytest.raises(ValueError, match="blockwise takes a criterion or an algorithm .*'alps'"):
        blockwise("alps")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs at least 1 epoch, .*got 0, 0.01 and 0"):
        blockwise(sc.alps, epochs=0)
    for method in (sc.sparsegpt, sc.alps):
        with pytest.raises(ValueError, match="takes a Grid, got 'int4': make one, such as Int4"):
            method(torch.ones(4, 8), torch.eye(8), sc.NM(2, 4), grid="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="refit takes a Grid, got 'int4': make one"):
        sc.refit(sc.wanda, grid="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blockwise takes a Grid, got 'int4': make one"):
        blockwise(sc.alps, grid="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 4, nan and 0"):
        blockwise(sc.alps, epochs=4, learning_rate=float("nan"))
    with pytest.raises(ValueError, match=r"others, got 1 batch: split it, as in tokens.split\(8\)"):
        sc.reconstruct_(decoder(), "2:4", sc.blockwise(sc.alps), tokens(1))
    with pytest.raises(ValueError, match="take functions such as sc.wanda, got Blockwise"):
        sc.prune_(decoder(), "2:4", sc.blockwise(sc.alps), tokens())  # type: ignore[arg-type]


# --- matrices inside other parameters ------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_inside_other_parameters_are_trained_to_the_block_s_output(kind: str) -> None:
    """Nearer to the dense model on new batches than SparseGPT, with zeros and the rest as is."""
    lost: list[float] = []
    dense, batches = problem(kind, 12)
    plan = sc.plan(dense, "2:4")
    for method in (sc.sparsegpt, sc.blockwise(sc.sparsegpt, learning_rate=0.02)):
        model, _ = problem(kind)
        report = sc.reconstruct_(model, plan, method, batches[:8])
        assert sc.check(model, plan) == dict.fromkeys(plan.layers, 0.5)
        off = [output(model, x) - output(dense, x) for x in batches[8:]]
        lost.append(float(torch.stack(off).square().mean()))
    assert lost[1] < 0.9 * lost[0]
    found = errors(report)
    assert len(found) == 2 * 2 and all(after < before for before, after in found.values())
    for one, other in zip(dense.parameters(), model.parameters(), strict=True):
        assert other.requires_grad and other.grad is None and type(other) is nn.Parameter
        assert one.dim() > 1 or torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_parameter_with_one_planned_matrix_the_others_stay_to_the_bit(kind: str) -> None:
    (model, batches), (dense, _), name = problem(kind), problem(kind), KINDS[kind][1]
    plan = sc.plan(model, "2:4", layers=name)
    start = sc.blockwise(zeroed, learning_rate=0.02)
    found = errors(sc.reconstruct_(model, plan, start, batches))
    assert all(after < before for before, after in found.values()) and found
    sc.check(model, plan)
    layer = layers.layers_of(model)[name]
    own = layers.parameter_of(layer)
    for key, parameter in model.named_parameters():
        planned = torch.zeros_like(parameter, dtype=torch.bool)
        if parameter is own:
            layers.weight_in(layer, planned).fill_(True)
        before = dense.get_parameter(key)
        assert torch.equal(parameter[~planned], before[~planned])
        assert not (parameter is own and torch.equal(parameter, before))


def test_a_block_is_cut_between_attention_and_what_follows_it() -> None:
    model, (x, *_) = problem("attention")
    inside = [f"self_attn.in_proj_weight.{n}" for n in "qkv"]
    found = cuts(model.layers[0], [*inside, "linear1", "linear2"], x)
    assert found == [(tuple(inside), "norm1"), (("linear1", "linear2"), None)]
    model, (x, *_) = problem("LSTM")
    found = cuts(model[0][0], ["rnn.weight_hh_l0", "up_proj"], x)
    assert found == [(("rnn.weight_hh_l0",), "norm2"), (("up_proj",), None)]


def test_experts_that_the_first_batch_does_not_choose_are_in_the_half_of_their_stack() -> None:
    """Two mixtures in a block: each expert belongs to the mixture that holds it."""
    from tests.model.test_experts import FIRST

    model, batches = problem("Qwen3Moe")
    source = observe(model, select(model).layers, [batches[0][:1, :1], *batches[1:]], [],
                     sequential=True, halves=True)  # fmt: skip
    halves = {o.half.name: o.half for o in source if o.half is not None}
    of_experts = halves["model.layers.0 (2 of 2)"]
    assert {n for n in of_experts.layers if n.startswith(FIRST)} == {
        f"{FIRST}.{stack}.{i}" for stack in ("gate_up_proj", "down_proj") for i in range(4)
    }


@pytest.mark.parametrize("kind", ["GptOss", "attention", "LSTM"])
def test_matrices_inside_other_parameters_end_on_a_grid(kind: str) -> None:
    model, batches = problem(kind)
    plan, grid = sc.plan(model, "2:4"), sc.Int4(8)
    method = sc.blockwise(sc.sparsegpt, grid=grid, epochs=2)
    report = sc.reconstruct_(model, plan, method, batches)
    assert len(errors(report)) == 4 and on_grid(grid, model, plan)
    assert min(sc.check(model, plan).values()) >= 0.5  # small ones round to zero
