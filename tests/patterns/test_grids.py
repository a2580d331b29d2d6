"""Quantisation grids: codes by hand, the search, and weights that lie on a grid already."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import secateur as sc
from secateur.patterns import Int2, Int3, grids
from secateur.patterns.grids import Grid

GRIDS: tuple[Grid, ...] = (
    *(sc.Int4(), sc.Int4(None), sc.Int4(20), sc.Int8(), sc.Fp8()),
    *(Int3(), Int2()),
)
NAMES = tuple(map(repr, GRIDS))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_weight(rows: int = 8, columns: int = 300, seed: int = 0) -> Tensor:
    """Normal weights with two zeros in every four."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    rank = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
    return weight * (rank < 2).flatten(1)


def levels(grid: Grid) -> Tensor:
    """Every code of the grid, in float32, written out from its definition."""
    if grid.name == "int4":
        return torch.arange(-7.0, 8.0)
    if grid.name in ("int2", "int3"):
        return torch.arange(-1.0, 2.0) if grid.name == "int2" else torch.arange(-3.0, 4.0)
    if grid.name == "int8":
        return torch.arange(-127.0, 128.0)
    fractions = [m / 8 * 2.0**-6 for m in range(8)]  # subnormal
    fractions += [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)]
    magnitudes = torch.tensor(fractions[:-1])  # the last bit pattern is NaN
    assert len(magnitudes) == 127 and float(magnitudes[-1]) == 448
    return torch.cat((-magnitudes.flip(0), magnitudes[1:]))


def in_groups(grid: Grid, weight: Tensor) -> list[Tensor]:
    return list(weight.split(grid.group_size or weight.shape[1], dim=1))


def rounded(grid: Grid, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales, and scale x code in the weight's dtype."""
    scales = grid.scales(weight)
    return scales, grid.dequantised(grid.codes(weight, scales), scales).to(weight.dtype)


def error(grid: Grid, weight: Tensor, scales: Tensor) -> Tensor:
    """Squared error of every row and group."""
    lost = (grid.dequantised(grid.codes(weight, scales), scales) - weight.float()).square()
    return torch.stack([part.sum(1) for part in in_groups(grid, lost)], dim=1)


def test_int4_by_hand() -> None:
    weight = torch.tensor([[7.0, -3.5, 0.4, -0.6, 0.0, 14.0, -2.0, 2.0]])
    scales = torch.tensor([[1.0, 2.0]])
    codes = sc.Int4(5).codes(weight, scales)
    assert codes.dtype == torch.int8 and codes.tolist() == [[7, -4, 0, -1, 0, 7, -1, 1]]
    assert sc.Int4(5).dequantised(codes, scales).tolist() == [[7, -4, 0, -1, 0, 14, -2, 2]]


def test_int8_and_fp8_by_hand() -> None:
    weight, scales = torch.tensor([[300.0, -300.0, 4.6, -0.4]]), torch.tensor([[2.0]])
    assert sc.Int8().codes(weight, scales).tolist() == [[127, -127, 2, 0]]
    codes = sc.Fp8().codes(torch.tensor([[1000.0, -9.5, 0.3, -1e-4]]), torch.tensor([[1.0]]))
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.float().tolist() == [[448.0, -9.0 - 1.0, 0.3125, 0.0]]  # 9.5 is a tie: to even
    assert codes.view(torch.uint8)[0, 3] == 0  # +0, not -0


@pytest.mark.parametrize("grid", GRIDS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_the_nearest_levels(grid: Grid, dtype: torch.dtype) -> None:
    weight = random_weight().to(dtype)
    scales = grid.scales(weight)
    assert scales.dtype == dtype
    assert scales.shape == (8, 1 if grid.group_size is None else -(-300 // grid.group_size))
    found = grid.codes(weight, scales).float()
    assert bool((found[weight == 0] == 0).all())
    for part, codes, s in zip(
        in_groups(grid, weight), in_groups(grid, found), scales.float().split(1, 1), strict=True
    ):
        ratios = part.double() / s.double()
        distances = (ratios[..., None] - levels(grid).double()).abs()
        own = (ratios - codes.double()).abs()
        assert bool((own <= distances.amin(-1) + 1e-6).all())


@pytest.mark.parametrize("grid", GRIDS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scale_times_code_is_exact_for_16_bit_scales(grid: Grid, dtype: torch.dtype) -> None:
    weight = random_weight().to(dtype)
    scales = grid.scales(weight)
    codes = grid.codes(weight, scales)
    wide = grid.dequantised(codes.clone(), scales)
    assert wide.dtype == torch.float32
    width = grid.group_size or 300
    for column in range(0, 300, 7):
        exact = codes[:, column].float().double() * scales[:, column // width].double()
        assert torch.equal(wide[:, column].double(), exact)


@pytest.mark.parametrize("grid", GRIDS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25)  # each takes a search over hundreds of levels
@given(data=st.data())
def test_a_weight_on_the_grid_is_recognised(
    grid: Grid, dtype: torch.dtype, data: st.DataObject
) -> None:
    """For any scales and codes, whether or not they reach the largest, bit for bit."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    reach = data.draw(st.floats(0.02, 1.0))
    columns = data.draw(st.sampled_from([4, 16, 20, 64, 132, 260]))
    groups = 1 if grid.group_size is None else -(-columns // grid.group_size)
    known = levels(grid)
    known = known[known.abs() <= max(reach * float(known.max()), float(known[known > 0].min()))]
    known = known[(known == 0) | (known.abs() >= 2.0**-4)]  # keep fp16 products normal
    codes = known[torch.randint(len(known), (6, columns), generator=generator)]
    scales = (torch.rand(6, groups, generator=generator) + 0.01).to(dtype)
    spread = scales.float().repeat_interleave(grid.group_size or columns, dim=1)[:, :columns]
    weight = (spread * codes).to(dtype)
    assert torch.equal(rounded(grid, weight)[1], weight)


@pytest.mark.parametrize("grid", GRIDS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_rounding_twice_is_rounding_once(grid: Grid, dtype: torch.dtype, seed: int) -> None:
    weight = random_weight(4, 140, seed).to(dtype)
    _, once = rounded(grid, weight)
    assert torch.equal(rounded(grid, once)[1], once)


@pytest.mark.parametrize("grid", GRIDS, ids=NAMES)
def test_the_search_never_loses_to_the_largest_magnitude(grid: Grid) -> None:
    weight = random_weight(32, 300)
    weight[:, 3] *= 4  # an outlier in the first group
    largest = float(levels(grid).max())
    plain = torch.cat([part.abs().amax(1, True) for part in in_groups(grid, weight)], 1) / largest
    searched = error(grid, weight, grid.scales(weight))
    assert bool((searched <= error(grid, weight, plain) * (1 + 1e-5)).all())
    if grid.name == "int4":
        assert float(searched.sum()) < 0.95 * float(error(grid, weight, plain).sum())


def test_int3_and_int2_by_hand() -> None:
    weight, scales = torch.tensor([[6.0, -3.2, 0.9, -1.1, 0.0, 5.0]]), torch.tensor([[2.0]])
    assert Int3().codes(weight, scales).tolist() == [[3, -2, 0, -1, 0, 2]]  # 2.5 is a tie: to even
    assert Int2().codes(weight, scales).tolist() == [[1, -1, 0, -1, 0, 1]]
    assert (repr(Int3()), repr(Int2(None))) == ("Int3(group_size=128)", "Int2(group_size=None)")
    assert Int3() != sc.Int4() and Int3(64) != Int3() == Int3(128)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(DTYPES), heavy=st.booleans())
def test_rounding_is_off_by_half_a_step_and_by_more_with_fewer_bits(
    seed: int, dtype: torch.dtype, heavy: bool
) -> None:
    """Half a step of what is not cut off, and nothing is cut off at the largest magnitude."""
    weight = random_weight(6, 260, seed)
    weight = (weight**3 if heavy else weight).to(dtype)
    norms = []
    for grid in (sc.Int4(), Int3(), Int2()):
        scales = grid.scales(weight)
        codes = grid.codes(weight, scales)
        largest = 2 ** (grid.bits - 1) - 1
        assert int(codes.abs().max()) <= largest
        step = scales.float().repeat_interleave(128, dim=1)[:, :260]
        off = (grid.dequantised(codes, scales) - weight.float()).abs()
        within = weight.float().abs() <= (largest + 0.5) * step
        assert bool((off <= step / 2 * (1 + 1e-5))[within].all())
        assert bool((codes.abs() == largest)[~within].all())
        norms.append(float(off.square().sum().sqrt()))
        plain = torch.stack([p.float().abs().amax(1) for p in weight.split(128, 1)], 1) / largest
        worst = (grid.dequantised(grid.codes(weight, plain), plain) - weight.float()).abs()
        spread = plain.repeat_interleave(128, dim=1)[:, :260]
        assert bool((worst <= spread / 2 * (1 + 1e-5)).all())
    assert norms[0] < norms[1] < norms[2]


def test_curvature_moves_the_scales_to_where_errors_cost() -> None:
    weight = random_weight(16, 256)
    curvature = torch.ones(256)
    curvature[::16] = 1000.0
    for grid in (sc.Int4(), sc.Int4(None)):
        plain, bent = grid.scales(weight), grid.scales(weight, curvature)
        costs = [
            float(((grid.dequantised(grid.codes(weight, s), s) - weight) ** 2 * curvature).sum())
            for s in (plain, bent)
        ]
        assert costs[1] < 0.8 * costs[0]
        assert float(error(grid, weight, plain).sum()) < float(error(grid, weight, bent).sum())


@pytest.mark.parametrize("grid", GRIDS, ids=NAMES)
def test_an_all_zero_group_has_scale_one_and_stays_zero(grid: Grid) -> None:
    weight = torch.zeros(3, 40)
    weight[1, 0] = 2.0
    scales, restored = rounded(grid, weight)
    assert bool((scales[[0, 2]] == 1).all())
    assert torch.equal(restored, weight)
    negative = torch.full((1, 8), -0.0)
    assert torch.equal(rounded(grid, negative)[1], torch.zeros(1, 8))


@pytest.mark.parametrize("grid", GRIDS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_and_largest_numbers(grid: Grid, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for size in (info.smallest_normal * info.eps, info.max):
        weight = torch.tensor([[size, 0.0, -size, 0.0]]).to(dtype)
        scales, restored = rounded(grid, weight)
        assert bool(scales.isfinite().all()) and bool((scales > 0).all())
        assert torch.equal(restored, weight)


def test_searching_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(16, 300)
    whole = [grid.scales(weight) for grid in GRIDS]
    monkeypatch.setattr(grids, "WEIGHTS_AT_ONCE", 700)
    assert all(
        torch.equal(grid.scales(weight), scales) for grid, scales in zip(GRIDS, whole, strict=True)
    )


@pytest.mark.parametrize("grid", GRIDS, ids=NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_located(grid: Grid, value: float) -> None:
    weight = random_weight()
    scales = grid.scales(weight)
    weight[5, 11] = value
    message = f"a grid needs finite weights, row 5 column 11 is {value}"
    with pytest.raises(ValueError, match=message):
        grid.scales(weight)
    with pytest.raises(ValueError, match=message):
        grid.codes(weight, scales)
    scales[3, 0] = value
    with pytest.raises(ValueError, match=f"finite scales, that of row 3 group 0 is {value}"):
        grid.codes(random_weight(), scales)


def test_other_dtypes_and_group_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got torch\.float64: scale x code is computed in"):
        sc.Int8().scales(torch.zeros(4, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="Int4 needs a group_size of at least 1, got 0"):
        sc.Int4(0)
    with pytest.raises(ValueError, match="Int2 needs a group_size of at least 1, got -1"):
        Int2(-1)


# --- training through rounding -------------------------------------------------------------------


def by_formula(
    grid: Grid, weight: Tensor, scales: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """LSQ's gradients in float64, weight by weight: of the weight, and of its group's scale."""
    of_weight, of_scales = torch.zeros_like(weight.double()), torch.zeros_like(scales.double())
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            group = column // (grid.group_size or weight.shape[1])
            ratio = float(weight[row, column].double() / scales[row, group].double())
            within = abs(ratio) <= grid.largest
            clipped = max(-grid.largest, min(grid.largest, ratio))
            code = float(grid.nearest(torch.tensor([clipped])))
            g = float(upstream[row, column])
            of_weight[row, column] = g if within else 0.0
            of_scales[row, group] += g * (code - ratio if within else code)
    return of_weight, of_scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [Int2(8), Int3(8), sc.Int4(8), sc.Int4(None), sc.Int8(), sc.Fp8()])
def test_gradients_pass_straight_through(grid: Grid, dtype: torch.dtype) -> None:
    """To float32's rounding, whatever the dtype that is stored: its rounding is passed, too."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 20, generator=generator)  # the last group is shorter
    upstream = torch.randn(3, 20, generator=generator)
    groups = 3 if grid.group_size else 1
    scales = (torch.rand(3, groups, generator=generator) + 1) * 0.5 / grid.largest
    scales = scales.to(dtype).float()  # some weights are beyond the largest code
    leaves = weight.clone().requires_grad_(), scales.clone().requires_grad_()
    found = grid.straight_through(*leaves, dtype)
    on_grid = grid.dequantised(grid.codes(weight, scales.to(dtype)), scales.to(dtype)).to(dtype)
    assert found.dtype == torch.float32 and torch.equal(found.detach(), on_grid.float())
    beyond = float((weight.abs() > scales.amax() * grid.largest).float().mean())
    assert 0.1 < beyond < 0.9
    of_weight, of_scales = torch.autograd.grad(found, leaves, upstream)
    expected = by_formula(grid, weight, scales, upstream)
    torch.testing.assert_close(of_weight.double(), expected[0])
    torch.testing.assert_close(of_scales.double(), expected[1], rtol=1e-4, atol=1e-4)
