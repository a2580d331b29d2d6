"""Experts that are packed: the same numbers, in files too, and the same stacks again."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.core.undo import all_or_nothing
from secateur.files.sidecar import read_sidecar
from secateur.formats.experts import SparseExperts, closed_experts, matrices_of, open_experts_
from secateur.report.inspection import inspect
from tests.model.test_experts import FAMILIES, FIRST, mixture, rows

EVERY = pytest.mark.parametrize("family", FAMILIES)


def logits(model: nn.Module, batch: Any = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(rows(1)[0] if batch is None else batch).logits
    return found


def pruned(family: str = "Qwen3Moe", layers: Any = "*.experts.*") -> tuple[nn.Module, sc.Plan]:
    model = mixture(family)
    plan = sc.plan(model, "2:4", layers=layers)
    sc.prune_(model, plan)
    return model, plan


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)


@EVERY
def test_a_packed_mixture_goes_to_files_and_back_to_stacks(family: str, tmp_path: Path) -> None:
    model, plan = pruned(family)
    before, dense = state(model), logits(model)
    report = sc.pack_(model)
    assert {name for name, *_ in report.layers} >= set(plan.layers)
    assert report.bytes_after < report.bytes_before
    packed = logits(model)
    torch.testing.assert_close(packed, dense, atol=1e-6, rtol=1e-5)
    owner = next(n for n, m in model.named_modules() if isinstance(m, SparseExperts))
    keys = {key.removeprefix(f"{owner}.") for key in model.state_dict() if key.startswith(owner)}
    stored = {f"{s}.{i}.{t}" for s in ("gate_up_proj", "down_proj") for i in range(4)
              for t in ("values", "metadata")}  # fmt: skip
    assert keys - {"gate_up_proj_bias", "down_proj_bias"} == stored
    sc.save(model, tmp_path / "out", plan=plan, reports=[report])
    assert set(read_sidecar(tmp_path / "out").packed) >= set(plan.layers)
    for loaded in (
        sc.load(tmp_path / "out"),
        sc.load(tmp_path / "out", mixture(family)),
        type(model).from_pretrained(tmp_path / "out"),
        copy.deepcopy(model),
    ):
        assert torch.equal(logits(loaded), packed)
        sc.unpack_(loaded)
        assert same(state(loaded), before) and torch.equal(logits(loaded), dense)
        sc.check(loaded, plan)
    back = sc.unpack_(model)
    assert len(back.layers) == len(report.layers)
    assert type(model.get_submodule(owner)) is type(mixture(family).get_submodule(owner))
    assert same(state(model), before) and torch.equal(logits(model), dense)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_some_of_the_experts_may_be_packed(family: str, tmp_path: Path) -> None:
    """The others are layers with memory of their own, and no stack is kept."""
    name = f"{FIRST}.down_proj.2"
    model, plan = pruned(family, name)
    before, dense = state(model), logits(model)
    sc.pack_(model, layers=[name])
    opened = [n for n, m in model.named_modules() if isinstance(m, SparseExperts)]
    assert opened == [FIRST]
    torch.testing.assert_close(logits(model), dense, atol=1e-6, rtol=1e-5)
    other = model.get_submodule(f"{FIRST}.down_proj.1").weight
    assert other.untyped_storage().nbytes() == other.nbytes
    assert not model.get_submodule(FIRST).shell._parameters["down_proj"]
    sc.save(model, tmp_path / "out", plan=plan)
    assert f"{FIRST}.down_proj.1.weight" in model.state_dict()
    for loaded in (sc.load(tmp_path / "out"), type(model).from_pretrained(tmp_path / "out")):
        assert torch.equal(logits(loaded), logits(model))
        sc.unpack_(loaded)
        assert same(state(loaded), before)


def test_what_is_listed_is_packed_and_what_fails_leaves_stacks(tmp_path: Path) -> None:
    model, _ = pruned(layers=f"{FIRST}.*")
    before, experts = state(model), model.get_submodule(FIRST)
    second = FIRST.replace(".0.", ".1.")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj\.0'.* row"):
        sc.pack_(model, layers=[f"{FIRST}.down_proj.0", f"{second}.down_proj.0"])
    assert model.get_submodule(FIRST) is experts and same(state(model), before)
    with pytest.raises(ValueError, match=r"no layer is named .*down_proj\.9'"):
        sc.pack_(model, layers=[f"{FIRST}.down_proj.9"])
    sc.pack_(model)
    assert not isinstance(model.get_submodule(second), SparseExperts)
    said = r"save_pretrained would convert the packed experts of model\.layers\.0\.mlp\.experts"
    with pytest.raises(ValueError, match=said):
        model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_packed_experts_are_seen_moved_trained_and_calibrated(family: str) -> None:
    model, _ = pruned(family)
    sc.pack_(model, "semi24")
    listed = {layer.layer: layer for layer in inspect(model).layers}
    assert listed[f"{FIRST}.gate_up_proj.1"].packed
    expected = logits(model)
    model.double()
    assert (logits(model) - expected).abs().max() < 1e-5
    model.float()
    batches = rows(2)
    model(batches[0], labels=batches[0]).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    report = sc.reconstruct_(model, sc.plan(model, "2:4", layers="*.q_proj"), sc.sparsegpt, batches)
    assert len(report.layers) == 2


def test_a_token_s_experts_are_run_and_no_others() -> None:
    model, _ = pruned()
    sc.pack_(model)
    experts = model.get_submodule(FIRST)
    ran: list[str] = []
    for name, layer in experts.layers().items():
        layer.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    x = torch.randn(3, 16)
    chosen = torch.tensor([[2, 0], [0, 2], [2, 0]])
    with torch.no_grad():
        found = experts(x, chosen, torch.full((3, 2), 0.5))
    assert ran == ["gate_up_proj.0", "gate_up_proj.2", "down_proj.0", "down_proj.2"]
    dense = sc.unpack_(model) and model.get_submodule(FIRST)
    with torch.no_grad():
        torch.testing.assert_close(found, dense(x, chosen, torch.full((3, 2), 0.5)))
        assert torch.equal(experts(x[:0], chosen[:0], torch.zeros(0, 2)), x[:0])


def test_experts_that_somebody_looks_at_or_shares_stay_closed() -> None:
    model = mixture()
    assert len(closed_experts(model)) == 2 and len(matrices_of(model)) == 2 * 2 * 4
    model.get_submodule(FIRST).register_forward_hook(lambda *_: None)
    assert FIRST not in closed_experts(model)
    model = mixture()
    one, two = (model.get_submodule(FIRST.replace(".0.", f".{i}.")) for i in range(2))
    one.down_proj = two.down_proj
    assert not closed_experts(model)


def test_opened_experts_multiply_by_the_stack_s_memory() -> None:
    model = mixture()
    stack = model.get_submodule(FIRST).gate_up_proj
    with all_or_nothing() as undo:
        open_experts_(model, undo, [f"{FIRST}.gate_up_proj.0"])
    layer = model.get_submodule(f"{FIRST}.gate_up_proj.3")
    assert layer.weight.data_ptr() == stack[3].data_ptr()
    assert list(closed_experts(model)) == [FIRST.replace(".0.", ".1.")]


def test_an_export_is_refused_with_the_remedy() -> None:
    model, _ = pruned()
    sc.pack_(model)
    given = torch.randn(3, 16), torch.zeros(3, 2, dtype=torch.int64), torch.full((3, 2), 0.5)
    with pytest.raises(Exception, match=r"packed experts cannot be exported, .* call unpack_\(mo"):
        torch.export.export(model.get_submodule(FIRST), given)
