"""Refit: held to each row's normal equations in float64, and to its own laws."""

import functools
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur as sc
from secateur.model.statistics import name_of, needed_by
from secateur.patterns import Pattern
from secateur.reconstruct import Solution, refitted
from secateur.reconstruct.refit import DAMPING, DAMPINGS, TOLERANCE
from tests.reconstruct.problems import model_and_batches, output_error, problem

EPS = torch.finfo(torch.float32).eps


def hessian(gram: Tensor, damping: float = 0.01) -> Tensor:
    H = gram.double()
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def row_by_row(weight: Tensor, mask: Tensor, H: Tensor) -> Tensor:
    """The solution of H_SS what_S = (H w)_S for every row, in float64."""
    exact = torch.zeros_like(weight, dtype=torch.float64)
    for row, S in enumerate(mask):
        exact[row, S] = torch.linalg.solve(H[S][:, S], H[S] @ weight[row].double())
    return exact


def excess(found: Tensor, exact: Tensor, H: Tensor) -> Tensor:
    """How far each row's error is above the least: ||found - exact||_H^2."""
    difference = found.double() - exact
    return ((difference @ H) * difference).sum(1)


def allowed(weight: Tensor, mask: Tensor, H: Tensor) -> Tensor:
    """What the tolerance allows, row by row: r^T A_SS^-1 r <= (2 TOLERANCE ||r_0||)^2 / lambda_min.

    The rounding of the result adds ||e||_H^2 with |e| <= EPS |what| elementwise, so at most
    (EPS sum_j n_j |what_j|)^2, since the normalised H has no entry above 1.
    """
    n = H.diagonal().sqrt()
    A = H / n[:, None] / n
    r = ((weight.double() * n).masked_fill(mask, 0) @ A).masked_fill(~mask, 0)
    stopped = (2 * TOLERANCE) ** 2 * r.square().sum(1) / torch.linalg.eigvalsh(A)[0]
    rounded = (2 * EPS * (row_by_row(weight, mask, H).abs() * n).sum(1)).square()
    return 2 * (stopped + rounded)


PATTERNS: list[Pattern] = [
    sc.NM(2, 4),
    sc.NM(1, 4),
    sc.Unstructured(0.7),
    sc.Unstructured(0.5, "layer"),
    sc.Block(4, 8, 0.5),
    sc.Channel(0.25, "in"),
]


@pytest.mark.parametrize("damping", [0.01, 0.3])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_is_the_solution_of_the_normal_equations(pattern: Pattern, damping: float) -> None:
    weight, gram = problem(columns=160)
    mask = pattern.mask(weight.abs() * gram.diagonal().sqrt())
    H = hessian(gram, damping)
    solution = refitted(weight, mask, gram, damping=damping)
    assert solution.note == "" and torch.equal(solution.mask, mask)
    over = excess(solution.weight, row_by_row(weight, mask, H), H)
    assert (over <= allowed(weight, mask, H)).all()
    assert not solution.weight[~mask].any()


def test_a_row_worked_out_by_hand() -> None:
    """Input 1 is dropped: H_00 what_0 = H_00 w_0 + H_01 w_1, so 2 what_0 = 2 x 3 + 1 x 4."""
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    mask = torch.tensor([[True, False]])
    solution = refitted(torch.tensor([[3.0, 4.0]]), mask, gram, damping=0.0)
    torch.testing.assert_close(solution.weight, torch.tensor([[5.0, 0.0]]))
    damped = refitted(torch.tensor([[3.0, 4.0]]), mask, gram, damping=0.5)  # H_00 = 3
    torch.testing.assert_close(damped.weight, torch.tensor([[3 + 4 / 3, 0.0]]))


def random_case(seed: int, rows: int, columns: int, kept: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, gram = problem(rows, columns, seed)
    return weight, torch.rand(rows, columns, generator=generator) < kept, gram


cases = st.builds(
    random_case,
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
)
few = settings(max_examples=60)


@few
@given(cases)
def test_the_error_is_never_above_that_of_zeroing(case: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, mask, gram = case
    H = hessian(gram)
    zeroed = weight.masked_fill(~mask, 0)
    found = refitted(weight, mask, gram).weight
    before, after = (excess(w, weight.double(), H) for w in (zeroed, found))
    assert (after <= before * (1 + 8 * EPS) + allowed(weight, mask, H)).all()
    assert torch.equal(found[~mask], torch.zeros(int((~mask).sum())))


@few
@given(cases)
def test_a_full_mask_and_rows_that_drop_nothing_stay_bit_for_bit(
    case: tuple[Tensor, Tensor, Tensor],
) -> None:
    weight, mask, gram = case
    assert torch.equal(refitted(weight, torch.ones_like(mask), gram).weight, weight)
    mask[0] = True
    assert torch.equal(refitted(weight, mask, gram).weight[0], weight[0])
    assert not refitted(weight, torch.zeros_like(mask), gram).weight.any()


@few
@given(cases)
def test_refitting_a_refit_changes_nothing(case: tuple[Tensor, Tensor, Tensor]) -> None:
    """A second refit on the same mask drops nothing."""
    weight, mask, gram = case
    once = refitted(weight, mask, gram).weight
    assert torch.equal(refitted(once, mask, gram).weight, once)


@few
@given(cases, st.integers(-20, 20), st.integers(-20, 20))
def test_scales_of_weight_and_inputs_go_through(
    case: tuple[Tensor, Tensor, Tensor], w: int, g: int
) -> None:
    """Powers of two change no bit: nothing is compared with a constant that has a unit."""
    weight, mask, gram = case
    one = refitted(weight, mask, gram).weight
    assert torch.equal(refitted(weight * 2.0**w, mask, gram * 2.0**g).weight, one * 2.0**w)


@few
@given(cases, st.randoms(use_true_random=False))
def test_rows_do_not_know_of_one_another(case: tuple[Tensor, Tensor, Tensor], random) -> None:  # type: ignore[no-untyped-def]
    weight, mask, gram = case
    order = list(range(len(weight)))
    random.shuffle(order)
    H = hessian(gram)
    one = refitted(weight, mask, gram).weight[order]
    other = refitted(weight[order], mask[order], gram).weight
    over = excess(one, other.double(), H)
    assert (over <= 4 * allowed(weight, mask, H)[order]).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpts_own_mask_bears_a_smaller_error(pattern: Pattern) -> None:
    for seed in range(3):
        weight, gram = problem(rows=16, columns=160, seed=seed)
        sparsegpt = sc.sparsegpt(weight, gram, pattern)
        found = refitted(weight, sparsegpt.mask, gram)
        assert torch.equal(found.mask, sparsegpt.mask)
        H = hessian(gram)
        before, after = (output_error(weight, s.weight, H) for s in (sparsegpt, found))
        assert after < 0.95 * before


def test_float64_takes_over_where_float32_cannot_reach_the_tolerance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a tolerance below float32's rounding, what is left is finished in float64."""
    module = importlib.import_module("secateur.reconstruct.refit")  # not the function of that name
    monkeypatch.setattr(module, "TOLERANCE", 1e-9)
    solved, left = module._solved, []

    def watched(*given):  # type: ignore[no-untyped-def]
        X, rough = solved(*given)
        left.append((X.dtype, int(rough.sum())))
        return X, rough

    monkeypatch.setattr(module, "_solved", watched)
    weight, gram = problem(columns=40)
    assert refitted(weight, sc.NM(2, 4).mask(weight.abs()), gram).note == ""
    assert left == [(torch.float32, 24), (torch.float64, 0)]


def test_inputs_that_were_never_active_keep_their_weights_and_are_reported() -> None:
    for damping in (0.0, 0.01):
        weight, gram = problem(columns=64)
        gram[:, 5] = gram[5, :] = 0
        mask = sc.NM(2, 4).mask(weight.abs())
        solution = refitted(weight, mask, gram, damping=damping)
        expected = weight[:, 5].masked_fill(~mask[:, 5], 0)
        assert torch.equal(solution.weight[:, 5], expected) and expected.any()
        assert solution.note == "1 inputs were never active"
        without = [i for i in range(64) if i != 5]
        alone = refitted(
            weight[:, without], mask[:, without], gram[without][:, without], damping=0.0
        )
        if damping == 0:
            torch.testing.assert_close(
                solution.weight[:, without], alone.weight, rtol=1e-3, atol=1e-3
            )


def test_inputs_without_any_activity_leave_the_kept_weights() -> None:
    weight, _ = problem(columns=16)
    mask = sc.NM(2, 4).mask(weight.abs())
    solution = refitted(weight, mask, torch.zeros(16, 16))
    assert torch.equal(solution.weight, weight.masked_fill(~mask, 0))
    assert solution.note == "16 inputs were never active"


def test_a_matrix_that_is_no_gram_matrix_is_told_in_the_note() -> None:
    """Along a direction of negative energy the error would fall for ever."""
    gram = torch.tensor([[1.0, 3.0, 1.0], [3.0, 1.0, 0.5], [1.0, 0.5, 1.0]])
    mask = torch.tensor([[True, True, False]])
    solution = refitted(torch.tensor([[1.0, 1.0, 1.0]]), mask, gram, damping=0.0)
    assert solution.weight.isfinite().all()
    assert solution.note == "the refit of 1 outputs did not converge, raise the damping"


def test_a_bfloat16_weight_is_solved_in_float32_and_rounded_once() -> None:
    weight, gram = problem(columns=64)
    low = weight.bfloat16()
    mask = sc.NM(2, 4).mask(weight.abs())
    solution = refitted(low, mask, gram)
    assert solution.weight.dtype == torch.bfloat16
    assert torch.equal(solution.weight, refitted(low.float(), mask, gram).weight.bfloat16())


def test_arguments_are_not_changed() -> None:
    weight, gram = problem(columns=64)
    mask = sc.NM(2, 4).mask(weight.abs())
    copies = weight.clone(), mask.clone(), gram.clone()
    refitted(weight, mask, gram)
    assert all(map(torch.equal, (weight, mask, gram), copies))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda g: g.index_fill_(0, torch.tensor(0), torch.nan), "this one has 8 entries that are"),
        (lambda g: g.fill_diagonal_(-2.0), "this one has a diagonal of -2: check the calibration"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(spoil, said: str) -> None:  # type: ignore[no-untyped-def]
    gram = spoil(torch.eye(8))
    with pytest.raises(ValueError, match=said):
        refitted(torch.ones(2, 8), torch.ones(2, 8, dtype=torch.bool), gram)


def test_a_damping_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="damping must be a number of at least 0, got -1: 0.01 is"):
        refitted(torch.ones(2, 8), torch.ones(2, 8) > 0, torch.eye(8), damping=-1.0)


def test_what_is_no_method_is_refused(unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"refit takes a criterion .*refitted"):
        sc.refit("wanda")  # type: ignore[arg-type]


# --- the damping that held-out batches choose ----------------------------------------------------


def parts_of_data(
    tokens: int, seed: int = 0, noise: float = 0.3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight, the Gram matrix of all tokens, its held-out part, and one of fresh tokens."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(8, 32, generator=generator)

    def draw(count: int) -> Tensor:
        of_each = torch.randn(count, 32, generator=generator)
        return torch.randn(count, 8, generator=generator) @ mix + noise * of_each

    x, fresh = draw(tokens), draw(4000)
    held = x[: tokens // 4]
    weight = torch.randn(20, 32, generator=generator)
    return weight, x.T @ x / tokens, held.T @ held / tokens, fresh.T @ fresh / len(fresh)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([12, 40, 100, 2000]), st.sampled_from(PATTERNS))
def test_the_damping_is_the_one_of_least_held_out_error(
    seed: int, tokens: int, pattern: Pattern
) -> None:
    """The choice is made again in float64, row by row; the refit is on all data with it."""
    weight, gram, held, _ = parts_of_data(tokens, seed)
    mask = pattern.mask(weight.abs())
    found = refitted(weight, mask, gram, held)
    errors = {}
    for damping in DAMPINGS:
        trained = row_by_row(weight, mask, hessian(gram - held, damping))
        errors[damping] = output_error(weight.double(), trained, held)
    by_note = [d for d in DAMPINGS if found.note == (f"damping {d:g}" if d != DAMPING else "")]
    (chosen,) = by_note
    assert errors[chosen] <= min(errors.values()) * (1 + 1e-3) + 1e-9
    assert torch.equal(found.weight, refitted(weight, mask, gram, damping=chosen).weight)


@pytest.mark.parametrize(
    ("tokens", "noise", "high"), [(40, 10.0, True), (4000, 0.3, False)], ids=["few", "many"]
)
def test_the_choice_pays_on_fresh_data(tokens: int, noise: float, high: bool) -> None:
    """A few tokens of nearly independent inputs need much damping, many tokens need little."""
    chosen, usual = 0.0, 0.0
    for seed in range(4):
        weight, gram, held, fresh = parts_of_data(tokens, seed, noise)
        mask = sc.NM(2, 4).mask(weight.abs() * gram.diagonal().sqrt())
        solution = refitted(weight, mask, gram, held)
        assert (float(solution.note.removeprefix("damping ")) > DAMPING) == high
        chosen += output_error(weight, solution.weight, fresh)
        usual += output_error(weight, refitted(weight, mask, gram).weight, fresh)
    assert chosen < 0.995 * usual


def test_every_nth_output_speaks_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("secateur.reconstruct.refit")  # not the function of that name
    weight, gram, held, _ = parts_of_data(40)
    mask = sc.NM(2, 4).mask(weight.abs())
    alone = refitted(weight[::10], mask[::10], gram, held)
    monkeypatch.setattr(module, "CHOOSING", 2)
    weight[1::10] *= 1e6  # outputs that are not sampled
    assert refitted(weight, mask, gram, held).note == alone.note != ""


@pytest.mark.parametrize("part", [0.0, 1.0])
def test_nothing_held_out_or_nothing_else_takes_the_usual_damping(part: float) -> None:
    weight, gram, _, _ = parts_of_data(40)
    mask = sc.NM(2, 4).mask(weight.abs())
    found = refitted(weight, mask, gram, part * gram)
    assert found.note == "" and torch.equal(found.weight, refitted(weight, mask, gram).weight)


def test_where_the_damping_does_not_matter_it_is_the_usual_one() -> None:
    weight, gram, held, _ = parts_of_data(40)
    assert refitted(weight, torch.ones_like(weight, dtype=torch.bool), gram, held).note == ""


def test_a_given_damping_is_taken_as_it_is() -> None:
    weight, gram, held, _ = parts_of_data(40)
    mask = sc.NM(2, 4).mask(weight.abs())
    given_one = refitted(weight, mask, gram, held, damping=0.2)
    assert given_one.note == ""
    assert torch.equal(given_one.weight, refitted(weight, mask, gram, damping=0.2).weight)


def test_a_held_out_part_that_is_no_gram_matrix_is_refused() -> None:
    weight, gram, held, _ = parts_of_data(40)
    held[0, 1] = torch.nan
    with pytest.raises(ValueError, match="a Gram matrix is finite .* has 1 entries"):
        refitted(weight, torch.ones_like(weight, dtype=torch.bool), gram, held)


@pytest.mark.parametrize("method", [sc.refit(sc.magnitude), sc.alps], ids=name_of)
def test_reconstructing_holds_the_second_batch_out(method) -> None:  # type: ignore[no-untyped-def]
    model, batches = model_and_batches()
    few = [batch[:16] for batch in batches]
    weight = model[0].weight.detach().clone()
    row = sc.reconstruct_(model, "2:4", method, few).layers[0]
    x, held = torch.cat(few), few[1]
    grams = x.T @ x / len(x), held.T @ held / len(x)
    expected = refitted(weight, model[0].weight != 0, *grams)
    assert row.note == expected.note != ""
    found = model[0].weight.detach()
    usual = refitted(weight, model[0].weight != 0, grams[0]).weight
    lost = [output_error(found, other, grams[0]) for other in (expected.weight, usual)]
    assert lost[0] < 1e-2 * lost[1]  # not 0: sums in another order may stop a step apart


def test_one_batch_takes_the_usual_damping() -> None:
    model, batches = model_and_batches()
    weight = model[0].weight.detach().clone()
    x = batches[0][:30]
    assert sc.reconstruct_(model, "2:4", sc.refit(sc.magnitude), [x]).layers[0].note == ""
    expected = refitted(weight, model[0].weight != 0, x.T @ x / len(x), damping=DAMPING)
    torch.testing.assert_close(model[0].weight.detach(), expected.weight, rtol=1e-2, atol=1e-4)


# --- as an algorithm -----------------------------------------------------------------------------


def test_a_method_with_its_refit_is_an_algorithm() -> None:
    for method, asks in (
        (sc.refit(sc.wanda), {"gram", "held_gram", "input_norm"}),
        (sc.refit(sc.magnitude, damping=0.1), {"gram"}),
        (sc.refit(sc.criteria.random), {"gram", "held_gram"}),
        (sc.refit(functools.partial(sc.sparsegpt, damping=0.1)), {"gram", "held_gram"}),
    ):
        assert set(needed_by(method, given=("weight", "pattern", "dtype", "layer"))) == asks
    assert name_of(sc.refit(sc.wanda)) == "refit(wanda)"
    assert name_of(sc.refit(sc.wanda, damping=0.1)) == "refit(wanda, damping=0.1)"
    damped = functools.partial(sc.sparsegpt, damping=0.1)
    assert name_of(sc.refit(damped)) == "refit(sparsegpt(damping=0.1))"


@pytest.mark.parametrize("method", [sc.wanda, sc.magnitude, sc.criteria.random], ids=name_of)
def test_reconstructing_takes_the_criterions_mask_and_refits_it(method) -> None:  # type: ignore[no-untyped-def]
    pruned, batches = model_and_batches()
    model, _ = model_and_batches()
    weight = model[0].weight.detach().clone()
    sc.prune_(pruned, "2:4", method, batches)
    report = sc.reconstruct_(model, "2:4", sc.refit(method, damping=0.01), batches)
    assert report.method == f"refit({name_of(method)}, damping=0.01)"
    mask = pruned[0].weight != 0
    assert torch.equal(model[0].weight != 0, mask)
    x = torch.cat(batches)
    H = hessian(x.T @ x / len(x))
    over = excess(model[0].weight.detach(), row_by_row(weight, mask, H), H)
    assert (over <= allowed(weight, mask, H)).all()
    sc.check(model, "2:4")


def test_reconstructing_takes_an_algorithms_mask_and_note() -> None:
    model, batches = model_and_batches()
    other, _ = model_and_batches()
    batches = [batch.index_fill(1, torch.tensor(3), 0.0) for batch in batches]
    plain = sc.reconstruct_(model, "2:4", sc.sparsegpt, batches).layers[0]
    found = sc.reconstruct_(other, "2:4", sc.refit(sc.sparsegpt), batches).layers[0]
    assert torch.equal(model[0].weight != 0, other[0].weight != 0)
    assert plain.note == "1 inputs were never active"
    assert found.note == "1 inputs were never active; damping 0.003"
    assert found.error is not None and plain.error is not None and found.error < plain.error


def test_what_an_algorithm_noted_comes_before_the_refits_note() -> None:
    def first_two(weight: Tensor, pattern: Pattern) -> Solution:
        return Solution(weight, torch.tensor([True, True, False, False]).expand(4, 4), "by hand")

    gram = torch.eye(4)
    gram[0, 0] = 0
    refits = sc.refit(first_two)
    found = refits(weight=torch.ones(4, 4), gram=gram, pattern=sc.NM(2, 4), layer="a")
    assert found.note == "by hand; 1 inputs were never active"
    assert found.weight.tolist() == [[1, 1, 0, 0]] * 4


def test_refit_itself_is_not_what_reconstruct_takes() -> None:
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match=r"refit makes an algorithm .*: pass sc.refit\(sc.wanda\)"):
        sc.reconstruct_(model, "2:4", sc.refit, batches)


def test_errors_name_the_layer() -> None:
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match=r"layer 0: damping must be a number of at least 0, got -"):
        sc.reconstruct_(model, "2:4", sc.refit(sc.wanda, damping=-1.0), batches)

    def short(weight: Tensor) -> Tensor:
        return weight[:1]

    with pytest.raises(ValueError, match=r"layer 0: criterion short needs to give scores of "):
        sc.reconstruct_(model, "2:4", sc.refit(short), batches)
