"""The last step of `sc.thorough`: what it trains, what it leaves, and that it never loses more."""

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.model.evaluate import compare
from secateur.model.layers import matrix, select, weight_in
from secateur.model.piece import parameter_name
from secateur.model.plan import match
from secateur.patterns import Int2, Int3, Pattern
from secateur.patterns.grids import Grid
from secateur.reconstruct import Blockwise, Solution, estimate
from secateur.reconstruct.estimate import distilling_bytes
from secateur.train.state import TrainingState
from secateur.train.together import held_out_loss, train_together_
from tests.inside import KINDS, problem
from tests.models import ConvNet, Decoder

together = importlib.import_module("secateur.train.together")
IGNORED = ["blocks.0.*", "lm_head"]


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder()


def tokens(count: int = 10, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(20, (4, 12), generator=generator) for _ in range(count)]


def zeroed(weight: Tensor, pattern: Any) -> Solution:
    """Large weights kept as they are: a start that leaves something to learn."""
    mask = pattern.mask(weight.abs())
    return Solution(weight * mask, mask)


METHOD = sc.blockwise(zeroed, epochs=1, distil=3)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


def note(report: Any) -> tuple[float, float]:
    """The held-out loss before and after, as the last layer's note says."""
    text = report.layers[-1].note.split("whole model: held-out loss ")[1]
    before, after = text.removesuffix(" after").split(" before training, ")
    return float(before), float(after)


def test_it_loses_less_than_the_blocks_did_on_batches_it_did_not_see() -> None:
    dense, plan, batches = decoder(), sc.plan(decoder(), "2:4"), tokens(40)
    blocks, whole = copy.deepcopy(dense), copy.deepcopy(dense)
    sc.reconstruct_(blocks, plan, sc.blockwise(zeroed, epochs=1), batches)
    report = sc.reconstruct_(whole, plan, METHOD, batches)
    sc.check(whole, plan)
    before, after = note(report)
    assert after < 0.8 * before
    held_out = batches[1::8]
    assert after == pytest.approx(held_out_loss(whole, dense, batches), rel=1e-3)
    assert before == pytest.approx(held_out_loss(blocks, dense, batches), rel=1e-3)
    assert compare(whole, dense, held_out).kl < compare(blocks, dense, held_out).kl
    assert report.method == "blockwise(zeroed, epochs=1, distil=3)"
    assert all(row.error is None for row in report.layers)


def test_only_planned_weights_change_and_their_zeros_stay() -> None:
    model = decoder()
    plan = sc.plan(model, "2:4", ignore=IGNORED)
    sc.prune_(model, plan)
    dense, before = decoder(), state(model)
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    layers = match(model, plan)
    first, last = train_together_(model, dense, layers, tokens(), 2)
    assert last < first
    for name, tensor in model.state_dict().items():
        planned = name.removesuffix(".weight") in plan.layers
        assert torch.equal(tensor, before[name]) != planned, name
        if planned:
            assert torch.equal(tensor == 0, before[name] == 0)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert same(dense, state(decoder()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_model_keeps_its_dtypes_and_what_was_not_planned_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = ConvNet().to(dtype)
    model = copy.deepcopy(dense)
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan)
    before = state(model)
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(4, 4, 8, 8, generator=generator).to(dtype) for _ in range(16)]
    first, last = train_together_(model, dense, match(model, plan), images, 4)
    assert last < first and last == held_out_loss(model, dense, images)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        planned = name.removesuffix(".weight") in plan.layers
        assert planned or torch.equal(tensor, before[name]), name
    assert same(dense, dense.state_dict())


def test_weights_that_lose_more_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "LEARNING_RATE", 100.0)
    model = decoder()
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan)
    before = state(model)
    first, last = train_together_(model, decoder(), match(model, plan), tokens(), 1)
    assert first == last == held_out_loss(model, decoder(), tokens())
    assert same(model, before)


def test_an_interruption_leaves_the_model_and_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, batches = sc.plan(decoder(), "2:4"), tokens()
    whole = decoder()
    sc.reconstruct_(whole, plan, METHOD, batches)

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    model = decoder()
    with monkeypatch.context() as patched:
        patched.setattr("secateur.prune.passes.train_together_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sc.reconstruct_(model, plan, METHOD, batches, checkpoint=tmp_path)
    assert same(model, state(decoder()))
    for _ in range(2):  # the second finds all of it finished
        model = decoder()
        report = sc.reconstruct_(model, plan, METHOD, batches, checkpoint=tmp_path)
        assert same(model, state(whole)) and note(report)[1] < note(report)[0]


def test_what_cannot_be_trained_is_said_before_anything_is_changed(tmp_path: Path) -> None:
    model = decoder()
    with pytest.raises(ValueError, match="distil at least 0, got 4, 0.01 and -1"):
        sc.blockwise(sc.alps, distil=-1)
    with pytest.raises(ValueError, match="needs a batch to hold out, the second, got 1"):
        sc.reconstruct_(model, "2:4", METHOD, tokens(1))
    assert same(model, state(decoder()))


def test_the_preset_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    model, batches = decoder(), tokens(4)
    assert sc.thorough == sc.blockwise(sc.alps, distil=4)
    assert sc.thorough.name == "blockwise(alps, distil=4)"
    sc.reconstruct_(model, "2:4", sc.thorough, batches)
    assert "blockwise(alps, distil=4): about" in capsys.readouterr().err


def test_bytes_and_time_are_those_of_the_blocks_and_of_the_whole_model() -> None:
    """A block has 8 width^2 weights, its layers keep 19 width numbers a token."""
    model = decoder()
    width, count = 16, 4 * 12
    layers = {n: m for n, m in select(model).layers.items() if n.startswith("blocks")}
    patterns = {name: sc.NM(2, 4) for name in layers}
    cheap, dear = (estimate(model, layers, patterns, tokens(), m) for m in (sc.best, sc.thorough))
    size, outputs = sum(p.numel() for p in model.parameters()), count * 20
    kept = 16 * 3 * 8 * width**2 + 4 * 3 * 19 * width * count + 32 * outputs
    assert dear.bytes == max(cheap.bytes + 4 * size, 4 * size + kept)
    assert distilling_bytes([], 10, 0, 2) == 60  # in 16 bits the model itself grows, too
    assert dear.seconds > 0


# --- on a grid -----------------------------------------------------------------------------------


def on_a_grid(grid: Grid, distil: int = 3) -> Blockwise:
    return sc.blockwise(zeroed, epochs=1, distil=distil, grid=grid)


def lies_on(grid: Grid, model: nn.Module, plan: sc.Plan) -> bool:
    weights = [model.get_parameter(f"{name}.weight").detach() for name in plan.layers]
    scales = [grid.scales(weight) for weight in weights]
    again = [grid.dequantised(grid.codes(w, s), s) for w, s in zip(weights, scales, strict=True)]
    return all(torch.equal(a.to(w.dtype), w) for a, w in zip(again, weights, strict=True))


@pytest.mark.parametrize("pattern", [sc.NM(2, 4), sc.Unstructured(0.0)], ids=str)
def test_on_a_grid_it_loses_less_than_the_blocks_did(pattern: Pattern) -> None:
    grid, batches = Int3(8), tokens(24)
    dense, plan = decoder(), sc.plan(decoder(), pattern, ignore=["lm_head"])
    blocks, whole = copy.deepcopy(dense), copy.deepcopy(dense)
    sc.reconstruct_(blocks, plan, sc.blockwise(zeroed, epochs=1, grid=grid), batches)
    report = sc.reconstruct_(whole, plan, on_a_grid(grid), batches)
    sc.check(whole, plan)
    before, after = note(report)
    assert after < 0.95 * before
    assert after == pytest.approx(held_out_loss(whole, dense, batches), rel=1e-3)
    assert before == pytest.approx(held_out_loss(blocks, dense, batches), rel=1e-3)
    assert lies_on(grid, whole, plan)
    assert report.method == f"blockwise(zeroed, epochs=1, distil=3, grid={grid!r})"
    planned = {f"{name}.weight" for name in plan.layers}
    for (name, one), other in zip(dense.named_parameters(), whole.parameters(), strict=True):
        assert (name in planned) or torch.equal(one, other)
        assert other.grad is None and other.requires_grad


def test_weights_that_were_rounded_to_zero_are_free_where_the_pattern_keeps_them() -> None:
    """The pattern keeps all; masks by what is zero now would leave two in five out of training."""
    model = decoder()
    plan = sc.plan(model, sc.Unstructured(0.0), ignore=["lm_head"])
    blocks = copy.deepcopy(model)
    sc.reconstruct_(blocks, plan, sc.blockwise(zeroed, epochs=1, grid=Int2(8)), tokens(24))
    sc.reconstruct_(model, plan, on_a_grid(Int2(8), 6), tokens(24))
    back = 0
    for name in plan.layers:
        one, other = (m.get_parameter(f"{name}.weight") != 0 for m in (blocks, model))
        back += int((other & ~one).sum())
    assert back > 0


def test_on_a_grid_weights_that_lose_more_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "LEARNING_RATE", 100.0)
    blocks, model = decoder(), decoder()
    sc.reconstruct_(blocks, "2:4", sc.blockwise(zeroed, epochs=1, grid=sc.Int4(8)), tokens())
    report = sc.reconstruct_(model, "2:4", on_a_grid(sc.Int4(8), 1), tokens())
    first, last = note(report)
    assert first == last
    assert same(model, state(blocks))


@pytest.mark.parametrize("part", ["off-grid", "on-grid"])
def test_on_a_grid_an_interruption_leaves_the_model_and_is_gone_on_from(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of either part; a state is kept at every step."""
    plan, batches, method = sc.plan(decoder(), "2:4"), tokens(), on_a_grid(sc.Int4(8), 2)
    whole = decoder()
    report = sc.reconstruct_(whole, plan, method, batches)
    keep, kept = TrainingState.keep, []

    def interrupted(self: TrainingState, *args: Any) -> None:
        keep(self, *args)
        kept.append(1)
        if len(kept) == {"off-grid": 3, "on-grid": 2 * 9 + 3}[part]:
            raise KeyboardInterrupt

    model = decoder()
    with monkeypatch.context() as patched:
        patched.setattr("secateur.train.distil.CHECKPOINT_SECONDS", 0.0)
        patched.setattr(TrainingState, "keep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sc.reconstruct_(model, plan, method, batches, checkpoint=tmp_path)
    assert same(model, state(decoder()))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for _ in range(2):  # the second finds all of it finished
        model = decoder()
        again = sc.reconstruct_(model, plan, method, batches, checkpoint=tmp_path)
        assert same(model, state(whole)) and note(again) == note(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Mixtral", "attention", "LSTM"])
def test_matrices_inside_other_parameters_are_trained_and_the_rest_stays(
    kind: str, dtype: torch.dtype
) -> None:
    """All matrices but one; that one lies between others of its parameter."""
    (model, batches), left = problem(kind, 16), KINDS[kind][1]
    model = model.to(dtype)
    batches = [x.to(dtype) if x.is_floating_point() else x for x in batches]
    dense, plan = copy.deepcopy(model), sc.plan(model, "2:4", ignore=left)
    sc.prune_(model, plan)
    before = state(model)
    layers = match(model, plan)
    first, last = train_together_(model, dense, layers, batches, 4)
    assert last < first and last == held_out_loss(model, dense, batches)
    assert sc.check(model, plan) == dict.fromkeys(plan.layers, 0.5)
    for key, parameter in model.named_parameters():
        planned = torch.zeros_like(parameter, dtype=torch.bool)
        for name, layer in layers.items():
            if parameter_name(name, layer) == key:
                weight_in(layer, planned).fill_(True)
        assert torch.equal(parameter[~planned], before[key][~planned])
        assert not planned.any() or not torch.equal(parameter, before[key])
        assert parameter.dtype == dtype and parameter.grad is None and parameter.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_thorough_takes_matrices_of_every_kind(kind: str) -> None:
    dense, batches = problem(kind, 16)
    lost = []
    for method in (sc.sparsegpt, sc.blockwise(sc.sparsegpt, epochs=1, distil=2)):
        model, _ = problem(kind)
        plan = sc.plan(model, "2:4")
        report = sc.reconstruct_(model, plan, method, batches)
        assert sc.check(model, plan) == dict.fromkeys(plan.layers, 0.5)
        lost.append(held_out_loss(model, dense, batches))
    assert lost[1] < 0.9 * lost[0]
    first, last = note(report)
    assert last < first and last == pytest.approx(lost[1], rel=1e-3)


def test_what_raises_at_the_end_puts_16_bit_matrices_back_where_they_are_now() -> None:
    """Training in float32 gave their parameters other memory in between."""
    model, batches = problem("attention", 4)
    model, batches = model.bfloat16(), [x.bfloat16() for x in batches]
    before, calls = state(model), []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        raise KeyboardInterrupt

    method = sc.blockwise(zeroed, epochs=1, distil=1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(importlib.import_module("secateur.prune.passes"), "report_of", failing)
        with pytest.raises(KeyboardInterrupt):
            sc.reconstruct_(model, "2:4", method, batches)
    assert calls and same(model, before)


def test_on_a_grid_matrices_inside_other_parameters_end_there() -> None:
    (model, batches), grid = problem("Qwen3Moe", 8), sc.Int4(8)
    method = sc.blockwise(zeroed, epochs=1, distil=1, grid=grid)
    plan = sc.plan(model, "2:4", layers="*.experts.*")
    before = state(model)
    sc.reconstruct_(model, plan, method, batches)
    assert min(sc.check(model, plan).values()) >= 0.5
    for name, layer in match(model, plan).items():
        weight = matrix(layer).detach().contiguous()
        scales = grid.scales(weight)
        assert torch.equal(grid.dequantised(grid.codes(weight, scales), scales), weight), name
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) == (".experts." not in key)
