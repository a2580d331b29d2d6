"""Sparse plus low rank of a whole model: what it leaves, what it writes, and what it undoes."""

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.prune.decompose import decompose_
from secateur.reconstruct import CompensationReport, Solution, alps, compensate, low_rank_part
from tests.models import ConvNet, Decoder
from tests.reconstruct.problems import gpt2_and_batches
from tests.reconstruct.test_lowrank import inputs
from tests.reconstruct.test_peft import config, merged

# One of three blocks: the others are no different.
FIRST = sc.plan(Decoder(), "2:4", layers="blocks.0.*")


def dense_model(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = Decoder().eval().to(dtype)
    return model, list(torch.randint(20, (4, 2, 9), generator=torch.Generator().manual_seed(0)))


def same(model: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def hooked(model: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def total(report: CompensationReport) -> float:
    return sum(row.error for row in report.layers)


@pytest.mark.parametrize("pattern", ["2:4", "block:4x4@0.5"])
def test_the_report_is_what_model_and_adapter_do(tmp_path: Path, pattern: str) -> None:
    model, batches = dense_model()
    dense = copy.deepcopy(model)
    plan = sc.plan(model, pattern, layers="blocks.1.*")
    report = decompose_(model, plan, sc.alps, batches, tmp_path / "a", rank=3)
    assert not hooked(model)
    sc.check(model, plan)
    adapted = merged(model, tmp_path / "a")
    assert [row.layer for row in report.layers] == list(plan.layers)
    for row in report.layers:
        x = inputs(adapted, row.layer, batches)
        W, fixed = (m.get_submodule(row.layer).weight.detach().double() for m in (dense, adapted))
        left, energy = (float((x @ w.T).square().sum()) for w in (W - fixed, W))
        assert row.error == pytest.approx(left / energy, rel=1e-3, abs=1e-9)
        assert row.tokens == 72 and row.extra == 3 * sum(W.shape)
    assert report.rank == 3 and report.parameters == sum(p.numel() for p in dense.parameters())


@pytest.mark.parametrize("method", [sc.sparsegpt, sc.alps])
def test_layers_lose_less_than_with_factors_found_afterwards(tmp_path: Path, method: Any) -> None:
    model, batches = dense_model()
    dense, pruned = copy.deepcopy(model), copy.deepcopy(model)
    sc.reconstruct_(pruned, FIRST, method, batches)
    after = compensate(pruned, dense, batches, tmp_path / "after", rank=2)
    report = decompose_(model, FIRST, method, batches, tmp_path / "a", rank=2)
    assert total(report) < 0.9 * total(after)


def test_the_algorithm_sees_what_the_dense_model_passes_on(tmp_path: Path) -> None:
    """With an algorithm that keeps every weight, its inputs are the dense model's."""
    model, batches = dense_model()
    dense = copy.deepcopy(model)
    seen: dict[str, Tensor] = {}

    def keep(weight: Tensor, gram: Tensor, pattern: sc.NM, layer: str) -> Solution:
        seen[layer] = gram
        return Solution(weight, torch.ones_like(weight, dtype=torch.bool))

    decompose_(model, sc.NM(4, 4), keep, batches, tmp_path / "a", rank=2)
    assert len(seen) == 18
    for name, gram in seen.items():
        x = inputs(dense, name, batches)
        torch.testing.assert_close(gram.double(), x.T @ x / len(x), rtol=1e-3, atol=1e-4)


def test_half_blocks_are_trained_with_the_factors_beside(tmp_path: Path) -> None:
    model, batches = dense_model()
    method = sc.blockwise(sc.refit(sc.wanda), epochs=2)
    report = decompose_(model, FIRST, method, batches, tmp_path / "a", rank=2)
    sc.check(model, FIRST)
    assert not hooked(model) and all(row.error < row.error_before for row in report.layers)


def test_full_rank_is_the_dense_model_again(tmp_path: Path) -> None:
    model, batches = dense_model()
    dense = copy.deepcopy(model)
    report = decompose_(model, FIRST, sc.refit(sc.wanda), batches, tmp_path / "a", rank=16)
    restored = merged(model, tmp_path / "a")
    torch.testing.assert_close(restored(batches[0]), dense(batches[0]), rtol=1e-4, atol=1e-4)
    assert max(row.error for row in report.layers) < 1e-9


def test_weights_of_16_bits_and_a_share_of_parameters(tmp_path: Path) -> None:
    model, batches = dense_model(torch.bfloat16)
    report = decompose_(model, "2:4", sc.refit(sc.wanda), batches, tmp_path / "a", extra=0.2)
    assert report.extra == 2 * 3 * (4 * 32 + 2 * 48) <= 0.2 * report.parameters
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(row.error < row.error_before for row in report.layers)


def test_transposed_weights_of_a_causal_language_model(tmp_path: Path) -> None:
    model, batches = gpt2_and_batches(blocks=1)
    dense = copy.deepcopy(model)
    plan = sc.plan(model, "2:4", layers="transformer.h.*")
    decompose_(model, plan, sc.refit(sc.wanda), batches, tmp_path / "a", rank=16)
    sc.check(model, plan)
    read = config(tmp_path / "a")
    assert read["task_type"] == "CAUSAL_LM" and read["fan_in_fan_out"] is True
    restored = merged(model, tmp_path / "a")(batches[0]).logits
    torch.testing.assert_close(restored, dense(batches[0]).logits, rtol=1e-3, atol=1e-3)


def test_an_interrupted_call_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    model, batches = dense_model()
    dense, straight = copy.deepcopy(model), copy.deepcopy(model)
    solved: list[str] = []

    def stopping(weight: Tensor, gram: Tensor, pattern: sc.NM, layer: str) -> Solution:
        solved.append(layer)
        if len(solved) == 4:
            raise KeyboardInterrupt
        return alps(weight, gram, pattern)

    go = partial(decompose_, plan=FIRST, algorithm=stopping, batches=batches, rank=2)
    with pytest.raises(KeyboardInterrupt):
        go(model, folder=tmp_path / "a", checkpoint=tmp_path / "kept")
    assert same(model, dense) and not hooked(model) and not (tmp_path / "a").exists()
    go(model, folder=tmp_path / "a", checkpoint=tmp_path / "kept")
    assert len(solved) - 4 < len(FIRST.layers)
    go(straight, folder=tmp_path / "b")
    assert same(model, straight)


def test_whatever_raises_leaves_the_model_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = dense_model()
    dense = copy.deepcopy(model)

    def refused(message: str, error: type[BaseException] = ValueError, **options: Any) -> None:
        usual: dict[str, Any] = {"plan": "2:4", "algorithm": sc.alps, "batches": batches, "rank": 2}
        with pytest.raises(error, match=message):
            decompose_(model, folder=tmp_path / "a", **{**usual, **options})
        assert same(model, dense) and not hooked(model) and list(tmp_path.iterdir()) == []

    refused("needs a rank, got none", rank=None)
    refused(r"q_proj is 16 x 16 .* 1 to 16, got 17", rank=17)
    refused("wanda only scores weights", algorithm=sc.wanda)
    refused("at least one batch, got none", batches=[])
    refused("out of range", error=IndexError, batches=[*batches, torch.full((2, 9), 20)])
    refused(
        "embed cannot be decomposed: it is an Embedding", plan=sc.plan(model, "2:4", layers="embed")
    )

    calls = iter(range(5))

    def fifth(weight: Tensor, *others: Any) -> Any:
        if next(calls) == 4:
            raise KeyboardInterrupt("fifth")
        return low_rank_part(weight, *others)

    def late(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt("late")

    with monkeypatch.context() as patched:
        patched.setattr("secateur.prune.decompose.low_rank_part", fifth)
        refused("fifth", error=KeyboardInterrupt)
    monkeypatch.setattr("secateur.prune.decompose.compensate", late)
    refused("late", error=KeyboardInterrupt, plan=FIRST)


def test_a_folder_that_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    model, _ = dense_model()
    with pytest.raises(ValueError, match="exists: remove it"):
        decompose_(model, "2:4", sc.alps, [], tmp_path, rank=2)


def test_a_convolution_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    model = ConvNet()
    with pytest.raises(ValueError, match="stem cannot be decomposed: it is a Conv2d"):
        decompose_(model, "unstructured:0.5", sc.alps, [], tmp_path / "a", rank=2)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = dense_model()
    monkeypatch.setattr("secateur.prune.decompose.team", lambda: SimpleNamespace(size=2))
    with pytest.raises(ValueError, match="one process: start it without torchrun"):
        decompose_(model, "2:4", sc.alps, batches, tmp_path / "a", rank=2)
