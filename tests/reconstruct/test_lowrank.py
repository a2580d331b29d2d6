"""Low-rank compensation: held to Eckart and Young in float64, and to the adapter's effect."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import secateur as sc
from secateur.reconstruct import compensate, compensation
from tests.models import ConvNet, Decoder
from tests.reconstruct.problems import gpt2_and_batches, problem
from tests.reconstruct.test_peft import config, merged, targeted


def case(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, half of it, and a Gram matrix, in float64."""
    weight, gram = (t.double() for t in problem(rows, columns, seed))
    return weight, weight.masked_fill(weight.abs() < 0.67, 0), gram


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def norm(matrix: Tensor, H: Tensor) -> float:
    return float(((matrix @ H) * matrix).sum())


def root(H: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(H)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


cases = st.builds(case, st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12))


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24), (32, 32)])
def test_the_error_is_the_sum_of_the_discarded_squared_singular_values(
    rows: int, columns: int, damping: float
) -> None:
    weight, sparse, gram = case(0, rows, columns)
    H = damped(gram, damping)
    singular = torch.linalg.svdvals((weight - sparse) @ root(H))
    for rank in (1, 5, 23):
        B, A = compensation(weight, sparse, gram, rank, damping)
        assert B.shape == (rows, rank) and A.shape == (rank, columns)
        error = norm(weight - sparse - B @ A, H)
        assert error == pytest.approx(float(singular[rank:].square().sum()), rel=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24)])
def test_is_the_papers_formula(rows: int, columns: int) -> None:
    """EoRA: the truncated SVD in the scaled eigenbasis of the inputs, mapped back."""
    weight, sparse, gram = case(0, rows, columns)
    values, Q = torch.linalg.eigh(damped(gram, 0.01))
    U, singular, Vh = torch.linalg.svd((weight - sparse) @ Q * values.sqrt(), full_matrices=False)
    paper = U[:, :6] * singular[:6] @ (Vh[:6] / values.sqrt() @ Q.T)
    B, A = compensation(weight, sparse, gram, 6)
    torch.testing.assert_close(B @ A, paper, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 2])
def test_no_product_of_that_rank_is_better(rank: int) -> None:
    """Alternating least squares from many starts gets no lower than the closed form."""
    weight, sparse, gram = case(3, 4, 5)
    E, H = weight - sparse, damped(gram, 0.01)
    generator = torch.Generator().manual_seed(0)
    ends = []
    for _ in range(20):
        A = torch.randn(rank, 5, generator=generator, dtype=torch.float64)
        for _ in range(300):
            B = torch.linalg.solve(A @ H @ A.T, A @ H @ E.T).T
            A = torch.linalg.solve(B.T @ B, B.T @ E)
        ends.append(norm(E - B @ A, H))
    B, A = compensation(weight, sparse, gram, rank)
    assert norm(E - B @ A, H) == pytest.approx(min(ends), rel=1e-6)


@settings(max_examples=60)
@given(cases, st.integers(0, 2**31))
def test_errors_fall_with_the_rank_to_zero_and_never_rise_on_other_inputs(
    problem: tuple[Tensor, Tensor, Tensor], seed: int
) -> None:
    weight, sparse, gram = problem
    E, H = weight - sparse, damped(gram, 0.01)
    x = torch.randn(3, len(gram), generator=torch.Generator().manual_seed(seed)).double()
    before, least = norm(E, H), 1e-12 * (norm(E, H) + 1e-12)
    for rank in range(1, min(E.shape) + 1):
        B, A = compensation(weight, sparse, gram, rank)
        torch.testing.assert_close(B.T @ B, torch.eye(rank, dtype=B.dtype))
        error = norm(E - B @ A, H)
        assert error <= before + least
        assert norm(E - B @ A, x.T @ x) <= norm(E, x.T @ x) * (1 + 1e-9) + 1e-12
        before = error
    assert before <= least
    torch.testing.assert_close(sparse + B @ A, weight)


@pytest.mark.parametrize("dead", [slice(0, 3), slice(None)])
def test_inputs_that_were_never_active_do_no_harm(dead: slice) -> None:
    weight, sparse, gram = case(0, 8, 12)
    gram[dead], gram[:, dead] = 0, 0
    B, A = compensation(weight, sparse, gram, 2, damping=0.0)
    singular = torch.linalg.svdvals((weight - sparse) @ root(gram))
    assert B.isfinite().all() and A.isfinite().all()
    error = norm(weight - sparse - B @ A, gram)
    assert error == pytest.approx(float(singular[2:].square().sum()), rel=1e-9, abs=1e-12)


def test_the_factors_have_the_weights_dtype_and_the_gram_matrix_stays() -> None:
    weight, sparse, gram = case(0, 8, 12)
    kept = gram.clone()
    B, A = compensation(weight.bfloat16(), sparse.bfloat16(), gram, 2)
    assert B.dtype == A.dtype == torch.bfloat16 and torch.equal(gram, kept)
    exact = compensation(weight.bfloat16().double(), sparse.bfloat16().double(), gram, 2)
    assert torch.equal(B, exact[0].bfloat16()) and torch.equal(A, exact[1].bfloat16())


@pytest.mark.parametrize(
    ("rank", "damping", "broken", "message"),
    [
        (0, 0.01, 1.0, "a 8 x 12 weight takes a rank of 1 to 8, got 0"),
        (9, 0.01, 1.0, "a 8 x 12 weight takes a rank of 1 to 8, got 9"),
        (2, -0.1, 1.0, "damping must be a number of at least 0, got -0.1"),
        (2, 0.01, float("nan"), "finite"),
    ],
)
def test_what_cannot_be_compensated(rank: int, damping: float, broken: float, message: str) -> None:
    weight, sparse, gram = case(0, 8, 12)
    with pytest.raises(ValueError, match=message):
        compensation(weight, sparse, gram * broken, rank, damping)


# --- the verb ------------------------------------------------------------------------------------


def pruned(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    dense = Decoder().eval().to(dtype)
    model = copy.deepcopy(dense)
    batches = list(torch.randint(20, (4, 2, 9), generator=torch.Generator().manual_seed(0)))
    sc.prune_(model, sc.plan(model, "2:4"), sc.wanda, batches)
    return dense, model, batches


def inputs(model: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """All rows that the layer receives, in float64."""
    seen: list[Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(seen).double()


def test_the_report_is_what_the_adapted_model_does(tmp_path: Path) -> None:
    """Each layer's error on its inputs once the adapter is attached to all layers."""
    dense, model, batches = pruned()
    state = copy.deepcopy(model.state_dict())
    report = compensate(model, dense, batches, tmp_path / "a", rank=3)
    adapted = merged(model, tmp_path / "a")
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    names.remove("lm_head")  # not pruned
    assert [row.layer for row in report.layers] == names
    for row in report.layers:
        x = inputs(adapted, row.layer, batches)
        W, S, fixed = (
            m.get_submodule(row.layer).weight.detach().double() for m in (dense, model, adapted)
        )
        lost, left, energy = (float((x @ w.T).square().sum()) for w in (W - S, W - fixed, W))
        assert row.error_before == pytest.approx(lost / energy, rel=1e-3)
        assert row.error == pytest.approx(left / energy, rel=1e-3)
        assert row.error < 0.7 * row.error_before
        assert row.tokens == 72 and row.extra == 3 * sum(W.shape)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_the_parameters_are_counted(tmp_path: Path) -> None:
    dense, model, batches = pruned()
    report = compensate(model, dense, batches, tmp_path / "a", rank=2)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors").values()
    assert report.extra == sum(t.numel() for t in stored) == 3 * 2 * (4 * 32 + 2 * 48)
    assert report.parameters == sum(p.numel() for p in dense.parameters()) == 7140
    assert report.nonzeros == sum(int((p != 0).sum()) for p in model.parameters()) < 7140
    assert f"{report.extra:,} extra parameters" in str(report)
    assert report.to_dict()["extra"] == report.extra
    assert len(report.rows()) == 18 and len(report.rows()[0]) == len(report.columns)


def test_full_rank_is_the_dense_model_again(tmp_path: Path) -> None:
    dense, model, batches = pruned()
    report = compensate(model, dense.state_dict(), batches, tmp_path / "a", rank=16)
    restored = merged(model, tmp_path / "a")
    torch.testing.assert_close(restored(batches[0]), dense(batches[0]), rtol=1e-4, atol=1e-4)
    assert max(row.error for row in report.layers) < 1e-9


@pytest.mark.parametrize("extra", [0.1, 0.29, 0.2875])
def test_a_share_chooses_the_largest_rank_within_it(tmp_path: Path, extra: float) -> None:
    dense, model, batches = pruned()
    report = compensate(model, dense, batches, tmp_path / "a", extra=extra)
    each = 3 * (4 * 32 + 2 * 48)
    assert report.extra == report.rank * each <= extra * 7140 < (report.rank + 1) * each


@pytest.mark.parametrize(("extra", "rank"), [(0.29, 1), (0.58, 2), (0.579, 1)])
def test_a_share_that_a_rank_meets_to_the_parameter_gets_that_rank(
    tmp_path: Path, extra: float, rank: int
) -> None:
    """Rank 1 takes 29 of 100 parameters; in floating point 0.29 * 100 is less than 29."""
    dense = nn.Sequential(nn.Linear(4, 25, bias=False), nn.ReLU())
    model = copy.deepcopy(dense)
    sc.prune_(model, "2:4")
    batches = list(torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0)))
    assert compensate(model, dense, batches, tmp_path / "a", extra=extra).rank == rank


def test_factors_are_stored_in_the_weights_dtype(tmp_path: Path) -> None:
    dense, model, batches = pruned(torch.bfloat16)
    report = compensate(model, dense, batches, tmp_path / "a", rank=4)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors").values()
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    assert all(row.error < row.error_before for row in report.layers)


def test_a_dense_model_of_higher_precision_is_the_same_where_nothing_was_pruned(
    tmp_path: Path,
) -> None:
    dense, model, batches = pruned()
    report = compensate(model.bfloat16(), dense, batches, tmp_path / "a", rank=1)
    assert "lm_head" not in {row.layer for row in report.layers}
    assert targeted(model, tmp_path / "a") == {row.layer for row in report.layers}


def test_a_causal_language_model_and_transposed_weights(tmp_path: Path) -> None:
    dense, batches = gpt2_and_batches(blocks=2)
    model = copy.deepcopy(dense)
    plan = sc.plan(model, "2:4", layers="transformer.h.*")
    sc.prune_(model, plan, sc.magnitude)
    compensate(model, dense, batches, tmp_path / "a", rank=16)
    read = config(tmp_path / "a")
    assert read["task_type"] == "CAUSAL_LM" and read["fan_in_fan_out"] is True
    assert set(read["target_modules"]) == set(plan.layers)
    restored = merged(model, tmp_path / "a")(batches[0]).logits
    torch.testing.assert_close(restored, dense(batches[0]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a rank, got none: pass rank=16, or extra=0.05"),
        ({"rank": 2, "extra": 0.1}, "extra=0.1 chooses the rank, got rank=2 too"),
        ({"rank": 0}, r"blocks\.0\.attention\.q_proj is 16 x 16 .* 1 to 16, got 0"),
        ({"rank": 17}, r"blocks\.0\.attention\.q_proj is 16 x 16 .* 1 to 16, got 17"),
        ({"extra": 0.01}, r"needs a share of 9\.41%, rank 1 for 18 layers, got 0\.01"),
        ({"extra": float("nan")}, "got nan"),
        ({"extra": 5.0}, "1 to 16, got 53"),
        ({"rank": 2, "damping": -1.0}, "damping must be"),
    ],
)
def test_bad_options_write_nothing(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    dense, model, batches = pruned()
    with pytest.raises(ValueError, match=message):
        compensate(model, dense, batches, tmp_path / "a", **options)
    assert list(tmp_path.iterdir()) == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_folder_that_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    dense, model, _ = pruned()
    with pytest.raises(ValueError, match="exists: remove it"):
        compensate(model, dense, [], tmp_path, rank=2)


def test_models_that_do_not_belong_together_write_nothing(tmp_path: Path) -> None:
    dense, model, batches = pruned()
    state = dense.state_dict()
    name = "blocks.1.up_proj.weight"

    def refused(other: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            compensate(model, other, batches, tmp_path / "a", rank=2)

    refused({**state, name: torch.zeros(8, 16)}, r"up_proj.weight is \(32, 16\) .* of \(8, 16\)")
    refused({k: v for k, v in state.items() if k != name}, "up_proj.weight .* has none")
    refused({**state, name: torch.full((32, 16), torch.nan)}, "up_proj.weight holds NaN")
    refused({**state, "embed.weight": torch.zeros(20, 16)}, "embed was pruned .* an Embedding")
    refused(model, "no weight differs")
    nn.utils.parametrizations.weight_norm(model.get_submodule("lm_head"))
    refused(dense, "lm_head.weight is computed by a parametrization")
    assert list(tmp_path.iterdir()) == []


def test_a_pruned_convolution_is_refused(tmp_path: Path) -> None:
    dense = ConvNet()
    model = copy.deepcopy(dense)
    sc.prune_(model, "unstructured:0.5", sc.magnitude)
    with pytest.raises(ValueError, match="stem was pruned .* it is a Conv2d"):
        compensate(model, dense, [torch.randn(2, 4, 8, 8)], tmp_path / "a", rank=2)
