"""Formats that round inputs token by token: codes, error, odd inputs, laws, how they are run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur.formats import SparseLinear, dynamic, parse_format
from secateur.formats.contract import Packed
from secateur.formats.dynamic import quantised
from secateur.formats.format import dequantised, weight_error
from secateur.formats.kernels import cusparselt, quantise
from secateur.formats.kernels.cusparselt import Setting
from secateur.formats.kernels.gpu import why_no_gpu
from secateur.formats.quantised import Quantised, torch_fp8, torch_int8
from secateur.formats.quantised import cusparselt as int8_cusparselt
from tests.formats.kernels.fake_cusparselt import Fake, install
from tests.formats.weights import (
    DYNAMIC,
    exact_linear,
    fitting_weight,
    sparse_linear,
    tokens_in,
    used_inputs,
)

INT8, FP8 = torch.int8, torch.float8_e4m3fn
DENSE = ("int8_dynamic", "fp8_dynamic")
SPARSE = ("semi24_int8_dynamic", "semi24_fp8_dynamic")
SEMI24_INT8, SEMI24_FP8, DENSE_INT8, DENSE_FP8 = (
    Quantised(grid, pattern, rounds_inputs=True)
    for pattern in (sc.NM(2, 4), None)
    for grid in (sc.Int8(), sc.Fp8())
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def codes_dtype(format: str) -> torch.dtype:
    return INT8 if "int8" in format else FP8


# ---- codes --------------------------------------------------------------------------------------


def test_int8_codes_by_hand() -> None:
    codes, scales = quantised(torch.tensor([[254.0, -127, 1, 3, -5], [0.5, 1, 0, -1, 0]]), INT8)
    assert scales.tolist() == [[2.0], [float(torch.tensor(1.0) / 127)]]
    assert codes.tolist() == [[127, -64, 0, 2, -2], [64, 127, 0, -127, 0]]  # ties to even


def test_fp8_codes_by_hand() -> None:
    codes, scales = quantised(torch.tensor([[896.0, -2, 2.125, 2.375, 2**-8, 2**-9]]), FP8)
    assert scales.tolist() == [[2.0]]
    assert codes.float().tolist() == [[448.0, -1, 1, 1.25, 2**-9, 0]]  # ties, subnormals


@pytest.mark.parametrize("codes", [INT8, FP8], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_codes_are_as_near_as_promised(dtype: torch.dtype, codes: torch.dtype) -> None:
    x = tokens_in(50, 64, dtype=dtype) * 2.0 ** torch.arange(-10, 10, 0.4)[:, None].to(dtype)
    found, scales = quantised(x, codes)
    assert scales.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide, s = x.double(), scales.double()
    allowed = s / 2 if codes == INT8 else torch.maximum(wide.abs() / 16, s / 1024)
    errors = (found.double() * s - wide).abs()
    assert bool((errors <= allowed * (1 + 1e-4)).all())  # x (1 / s) is rounded before it is a code
    assert bool((errors > 0.9 * allowed).any())


@pytest.mark.parametrize("codes", [INT8, FP8], ids=str)
def test_tokens_that_have_no_ordinary_scale(codes: torch.dtype) -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[0.0, 0], [1e-45, 0], [nan, 1], [inf, 1], [-inf, nan], [1, -1]])
    found, scales = quantised(x, codes)
    assert scales[:2, 0].tolist() == [2.0**-126] * 2
    assert scales[2:, 0].isnan().tolist() == [True, True, True, False]
    assert not found[:5].float().any()
    largest = quantise.LARGEST[codes]
    assert found[5].tolist() == [largest, -largest]


# ---- results ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", DYNAMIC)
def test_a_result_by_hand(format: str) -> None:
    """Codes 127, 0 | 448, 1 and -127 | -448; row scales 1 and 2; a token scale of 2."""
    largest = quantise.LARGEST[codes_dtype(format)]
    weight = torch.tensor([[largest, 0, 0, 1], [0, -2 * largest, 0, 0]])
    layer = SparseLinear(parse_format(format).pack(weight), nn.Parameter(torch.tensor([0.5, 1])))
    x = torch.tensor([[2 * largest, 2, 0, -6]])
    assert layer(x).tolist() == [[2 * largest**2 - 5.5, -4 * largest + 1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", DYNAMIC)
def test_the_error_is_that_of_rounding_the_inputs(format: str, dtype: torch.dtype) -> None:
    layer, x = sparse_linear(format, 16, 104, dtype), tokens_in(33, 104, dtype=dtype)
    meant = dequantised(layer.packed).double()
    exact, result = exact_linear(x, meant, layer.bias), layer(x).detach().double()
    _, scales = quantised(x, codes_dtype(format))
    wide = x.double().abs()
    off = scales.double() / 2 if "int8" in format else torch.maximum(wide / 16, scales / 1024)
    allowed = off.expand_as(wide) @ meant.abs().t() * (1 + 1e-6)
    rounding = torch.finfo(dtype).eps * (exact.abs() + allowed) + 1e-6 * wide @ meant.abs().t()
    error = (result - exact).abs()
    assert bool((error <= allowed + rounding).all())
    assert float(error.max()) > 0.1 * float(allowed.mean())  # inputs are rounded indeed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", DYNAMIC)
def test_a_token_that_is_not_finite_gives_nan_and_leaves_the_others(
    format: str, dtype: torch.dtype
) -> None:
    layer, x = sparse_linear(format, dtype=dtype), tokens_in(6, 24, dtype=dtype)
    clean = layer(x)
    x[1, 3], x[4, 0] = torch.nan, -torch.inf
    result = layer(x)
    assert bool(result[[1, 4]].isnan().all())
    assert torch.equal(result[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


@pytest.mark.parametrize("format", DYNAMIC)
def test_zero_tokens_and_zero_rows_give_the_bias(format: str) -> None:
    weight = fitting_weight(format, 16, 24)
    weight[5] = 0
    layer = SparseLinear(parse_format(format).pack(weight), nn.Parameter(tokens_in(16)))
    x = tokens_in(3, 24)
    x[1] = 0
    result = layer(x)
    assert torch.equal(result[1], layer.bias) and torch.equal(result[:, 5], layer.bias[5].expand(3))


@pytest.mark.parametrize("format", DYNAMIC)
def test_one_huge_input_takes_the_codes_of_the_others(format: str) -> None:
    """A scale for the whole token: what is below half a code is gone, in this token alone."""
    layer = sparse_linear(format, bias=False)
    x = tokens_in(2, 24).clamp(-1, 1)
    x[0, 7] = 1e6
    result, column = layer(x), dequantised(layer.packed)[:, 7]
    assert torch.allclose(result[0], 1e6 * column, rtol=1e-5, atol=0)
    assert torch.equal(result[1], layer(x[1:])[0])


@pytest.mark.parametrize("format", DYNAMIC)
def test_inputs_of_three_dimensions_have_a_scale_for_every_token(format: str) -> None:
    layer = sparse_linear(format)
    x = tokens_in(2, 5, 24) * torch.tensor([1e-3, 1, 1e3, 7, 0])[:, None]
    assert torch.equal(layer(x), layer(x.view(10, 24)).view(2, 5, 16))
    assert layer(x[:, :0]).shape == (2, 0, 16)


# ---- laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", DYNAMIC)
@settings(max_examples=15)
@given(power=st.integers(-30, 30), seed=st.integers(0, 2**16))
def test_a_power_of_two_passes_through(format: str, power: int, seed: int) -> None:
    layer, x = sparse_linear(format, bias=False), tokens_in(5, 24, seed=seed)
    assert torch.equal(layer(x * 2.0**power), layer(x) * 2.0**power)


@pytest.mark.parametrize("format", DYNAMIC)
@settings(max_examples=15)
@given(order=st.permutations(range(6)), more=st.integers(0, 30), seed=st.integers(0, 2**16))
def test_tokens_do_not_see_each_other(format: str, order: list[int], more: int, seed: int) -> None:
    """Integer sums give the same bits; sums of floats may be added up in another order."""
    layer, x = sparse_linear(format), tokens_in(6, 24, seed=seed)
    others = 100 * tokens_in(more, 24, seed=seed + 1)
    result = layer(torch.cat((x[order], others)))[:6]
    if "int8" in format:
        assert torch.equal(result, layer(x)[order])
    else:
        assert torch.allclose(result, layer(x)[order], rtol=1e-5, atol=1e-5)


# ---- what is stored -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "weight_only"),
    [(one, replace(one, rounds_inputs=False)) for one in (SEMI24_INT8, SEMI24_FP8)],
    ids=SPARSE,
)
def test_the_sparse_ones_store_what_the_weight_only_ones_do(
    chosen: Quantised, weight_only: Quantised
) -> None:
    weight = fitting_weight("semi24", 16, 64, torch.bfloat16)
    ours, theirs = chosen.pack(weight), weight_only.pack(weight)
    assert str(ours.format) == f"{theirs.format}_dynamic"
    assert list(ours.tensors) == list(theirs.tensors)
    for key, tensor in theirs.tensors.items():
        assert torch.equal(ours.tensors[key], tensor)
    assert chosen.empty((16, 64), 16, torch.bfloat16).format == ours.format
    name = ours.format
    assert chosen.why_not(weight) is None and chosen.density(weight) == 0.5
    assert (chosen.why_not(torch.ones(2, 8)) or "").startswith(f"{name} needs at most 2 nonzeros")
    with pytest.raises(ValueError, match=f"pack into {name} needs a float32"):
        chosen.pack(weight.double())


def test_dense_codes_by_hand() -> None:
    weight = torch.tensor([[127.0, -3, 1, 2], [-254, 0, 2, 4]])
    packed = DENSE_INT8.pack(weight)
    assert packed["scales"].tolist() == [[1.0], [2.0]]
    assert packed["values"].tolist() == [[127, -3, 1, 2], [-127, 0, 1, 2]]
    floats = DENSE_FP8.pack(torch.tensor([[448.0, -3, -1, 0.125]]))
    assert floats["scales"].tolist() == [[1.0]]
    assert floats["values"].tolist() == [[0x7E, 0xC4, 0xB8, 0x20]]


def test_the_row_that_the_page_draws() -> None:
    packed = DENSE_INT8.pack(torch.tensor([[63.5, 1, 0, -1, 2.5, 2, 0.5, 0]]))
    assert packed["scales"].tolist() == [[0.5]]
    assert packed["values"].tolist() == [[127, 2, 0, -2, 5, 4, 1, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("format", "most"), [("int8_dynamic", 0.01), ("fp8_dynamic", 0.03)])
def test_a_weight_without_zeros_is_packed_dense(
    format: str, most: float, dtype: torch.dtype
) -> None:
    chosen, weight = parse_format(format), tokens_in(16, 256, dtype=dtype)
    assert bool((weight != 0).all())
    assert chosen.why_not(weight) is None and chosen.density(weight) == 1.0
    packed = chosen.pack(weight)
    grid = sc.Int8() if "int8" in format else sc.Fp8()
    scales = grid.scales(weight)
    assert torch.equal(dequantised(packed), grid.dequantised(grid.codes(weight, scales), scales))
    assert 0 < weight_error(weight, packed) < most
    assert packed.nbytes == weight.numel() + 16 * weight.element_size()
    dense = packed.dense()
    assert torch.equal(chosen.pack(dense).dense(), dense)
    assert chosen.why_broken(packed) is None


@pytest.mark.parametrize("format", DENSE)
def test_damage_is_located_and_other_dtypes_are_refused(format: str) -> None:
    chosen = parse_format(format)
    packed = chosen.pack(tokens_in(3, 8))
    tensors = {key: tensor.clone() for key, tensor in packed.tensors.items()}
    tensors["values"][2, 5] = -128 if format == "int8_dynamic" else 0xFF
    what = "the code -128" if format == "int8_dynamic" else "a NaN"
    damaged = replace(packed, tensors=tensors)
    assert chosen.why_broken(damaged) == f"values of row 2 column 5 hold {what}"
    tensors = dict(packed.tensors) | {"scales": torch.full((3, 1), torch.nan)}
    damaged = replace(packed, tensors=tensors)
    assert chosen.why_broken(damaged) == "scales of row 0 group 0 are nan"
    with pytest.raises(ValueError, match=f"pack into {format} needs a float32"):
        chosen.pack(torch.ones(3, 8, dtype=torch.float64))
    assert "got torch.float64" in (chosen.why_not(torch.ones(3, 8, dtype=torch.float64)) or "")
    with pytest.raises(ValueError, match=f"{format} needs 3 rows of codes, got 2: the descrip"):
        chosen.empty((3, 8), 2, torch.float32)


@pytest.mark.parametrize("format", DYNAMIC)
def test_a_model_is_packed_saved_and_loaded(
    format: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("saved") / "model"
    models = [nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(2)]
    if format in SPARSE:
        for layer in (models[0][0], models[0][2]):
            shape = (layer.out_features, layer.in_features)
            layer.weight.data.copy_(fitting_weight("semi24", *shape))
    x = tokens_in(5, 64)
    before = models[0](x).detach()
    report = sc.pack_(models[0], format)  # all layers, with zeros or without
    assert [row[1] for row in report.layers] == [format] * 2 and report.weight_error > 0
    sc.save(models[0], folder, reports=[report])
    loaded = sc.load(folder, models[1])
    assert str(loaded[0].format) == format  # type: ignore[index]
    assert torch.equal(loaded(x), models[0](x))
    assert float((loaded(x).detach() - before).norm() / before.norm()) < 0.1


# ---- how they are run, with the definition in the place of the GPU's kernels --------------------


def plain_quantise(x: Tensor, codes: torch.dtype, rows: int) -> tuple[Tensor, Tensor]:
    found, scales = quantised(x, codes)
    padded = torch.zeros(rows, x.shape[1], dtype=codes)
    padded.view(torch.uint8)[: len(x)] = found.view(torch.uint8)
    return padded, scales[:, 0].float()


def plain_scale_bias(
    product: Tensor,
    token_scales: Tensor,
    row_scales: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    factor: float = 1.0,
) -> Tensor:
    result = product[: len(token_scales)].float() * (token_scales * factor)[:, None]
    result = result if row_scales is None else result * row_scales.float()
    return (result if bias is None else result + bias.float()).to(dtype)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "quantise", plain_quantise)
    monkeypatch.setattr(quantise, "scale_bias", plain_scale_bias)


def is_right(format: str, runs: Callable[..., Tensor], tokens: int, dtype: torch.dtype) -> None:
    """Within two roundings of the definition's exact result, and one of float32 sums."""
    eps = torch.finfo(dtype).eps
    layer, x = sparse_linear(format, 32, 64, dtype), tokens_in(tokens, 64, dtype=dtype)
    meant = dequantised(layer.packed)
    for bias in (None, layer.bias.detach()):
        exact = exact_linear(used_inputs(format, x), meant, bias)
        product = exact_linear(used_inputs(format, x), meant, None)
        result = runs(x, layer.packed, bias)
        assert result.dtype == dtype and result.shape == (tokens, 32)
        most = eps * (exact.abs() + product.abs()) + 1e-5 * product.abs().max()
        assert bool(((result - exact).abs() <= most).all())


@pytest.mark.parametrize("tokens", [1, 17, 24, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_int8_through_torch(
    plain: None, monkeypatch: pytest.MonkeyPatch, tokens: int, dtype: torch.dtype
) -> None:
    seen, multiply = list[int](), torch._int_mm

    def watched(left: Tensor, right: Tensor) -> Tensor:
        seen.append(len(left))
        return multiply(left, right)

    monkeypatch.setattr(torch, "_int_mm", watched)
    is_right("int8_dynamic", torch_int8.linear, tokens, dtype)
    assert all(rows > 16 and rows % 8 == 0 and rows >= tokens for rows in seen) and seen


@pytest.mark.parametrize("tokens", [1, 17, 33])
def test_dense_fp8_through_torch(plain: None, tokens: int) -> None:
    is_right("fp8_dynamic", torch_fp8.linear, tokens, torch.bfloat16)


def blob_of(packed: Packed) -> Packed:
    return replace(packed, tensors=int8_cusparselt.arrange(packed))


@pytest.mark.parametrize("tokens", [1, 31, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sparse_through_cusparselt(
    plain: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    tokens: int,
) -> None:
    good, wrong = Setting(0), Setting(1)
    times = {good: 10.0, wrong: 1.0}
    fake = install(monkeypatch, tmp_path_factory.mktemp("cache"), Fake(times, wrong={wrong}))

    def run(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        return int8_cusparselt.linear(x, blob_of(packed), bias)

    is_right("semi24_int8_dynamic", run, tokens, dtype)
    searched = len(fake.seen)
    is_right("semi24_int8_dynamic", run, tokens, dtype)
    assert fake.seen[searched:] == [good, good]  # remembered
    assert fake.biases == [None] * len(fake.biases)  # it comes after the scales of the tokens


def test_float16_holds_the_product_of_codes(
    plain: None, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """y = 3200 where x is 1; sums of codes are 127 times that, and float16 ends at 65504."""
    install(monkeypatch, tmp_path_factory.mktemp("cache"), Fake({Setting(0): 1.0}))
    weight = torch.zeros(32, 64, dtype=torch.float16)
    weight[:, ::2] = 100
    packed, x = SEMI24_INT8.pack(weight), torch.ones(2, 64, dtype=torch.float16)
    result = int8_cusparselt.linear(x, blob_of(packed), None)
    assert torch.allclose(result, torch.full_like(result, 3200), rtol=2e-3)


def test_an_arrangement_survives_a_cast(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`.to(torch.bfloat16)` of a bfloat16 layer casts every buffer of another floating dtype."""
    install(monkeypatch, tmp_path_factory.mktemp("cache"), Fake({}))
    packed = sparse_linear("semi24_int8_dynamic", 32, 64, torch.bfloat16).packed
    arranged = int8_cusparselt.arrange(packed)
    assert all(tensor.dtype == torch.uint8 for tensor in arranged.values())
    scales = packed["scales"][:, 0].float()
    assert torch.equal(arranged["alpha"].view(torch.float32) * int8_cusparselt.HEADROOM, scales)


# ---- why not ------------------------------------------------------------------------------------


def test_what_torchs_products_need() -> None:
    whole, ragged = torch.zeros(16, 16), torch.zeros(12, 16)
    said = torch_int8.why_not(DENSE_INT8.pack(ragged), 1)
    assert said == (
        "int8_dynamic torch needs out_features and in_features that are multiples of 8, "
        "got 12 x 16: pad the layer with zeros"
    )
    said = torch_fp8.why_not(DENSE_FP8.pack(whole[:8].bfloat16()), 1)
    assert said is not None and "multiples of 16, got 8 x 16: pad" in said
    said = torch_fp8.why_not(DENSE_FP8.pack(whole), 1)
    assert said == "fp8_dynamic torch needs bfloat16, got torch.float32: cast the layer"
    said = torch_int8.why_not(DENSE_INT8.pack(whole), 1)
    assert said == why_no_gpu(torch.device("cpu"))


def test_what_the_kernels_need(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(quantise, "find_spec", lambda name: None)
    said = dynamic.why_not(INT8, device)
    assert said == "quantising tokens needs Triton, got a Python without it: pip install triton"
    monkeypatch.setattr(quantise, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert dynamic.why_not(INT8, device) is None
    said = dynamic.why_not(FP8, device)
    assert said is not None and "needs compute capability 8.9, this GPU has 8.6" in said


def on_device(
    why_not: Callable[..., str | None], device: torch.device
) -> Callable[..., str | None]:
    return lambda *given: why_not(*given[:-1], device)


def test_what_cusparselt_on_codes_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(quantise, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    for module in (cusparselt, dynamic):  # as if the weight were there
        monkeypatch.setattr(module, "why_not", on_device(module.why_not, device))

    def said_of(rows: int, dtype: torch.dtype) -> str | None:
        return int8_cusparselt.why_not(SEMI24_INT8.pack(torch.zeros(rows, 64).to(dtype)), 9)

    assert said_of(32, torch.float16) is None
    said = said_of(32, torch.float32)
    assert (
        said == "cuSPARSELt on codes needs bfloat16 or float16, got torch.float32: cast the layer"
    )
    said = said_of(48, torch.float16)
    assert said is not None and said.startswith("cuSPARSELt in int8 needs")
    assert "multiples of 32, got 48 x 64" in said


def test_importing_the_formats_imports_no_triton() -> None:
    """The kernels lie in a module that is imported when one is called."""
    text = Path(quantise.__file__).read_text()
    assert not any(line.startswith(("import triton", "from triton")) for line in text.splitlines())
