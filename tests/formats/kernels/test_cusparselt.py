"""cuSPARSELt: arguments as it wants them, and only algorithms that are right, remembered."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from secateur.formats.kernels import cusparselt_child, cusparselt_search, cusparselt_settings
from secateur.formats.kernels.cusparselt import (
    LARGEST_BUCKET,
    STEPS,
    SearchCase,
    Setting,
    case_of,
    compress,
    multiply,
    why_not,
)
from secateur.formats.kernels.cusparselt_search import allowed, search
from secateur.formats.kernels.cusparselt_settings import (
    chosen,
    remember,
    search_isolated,
    setting_for,
)
from secateur.formats.kernels.gpu import why_no_gpu
from tests.formats.kernels.fake_cusparselt import Fake, forget, install

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
OUT, WIDTH = 32, 64
LIBRARY = "A GPU, 132 SMs, cuSPARSELt 702"
PLAIN = {Setting(number): 10.0 + number for number in range(6)}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Fake]:
    yield install(monkeypatch, tmp_path / "cache", Fake(dict(PLAIN)))
    forget()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_in(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    rank = torch.rand(OUT, WIDTH // 4, 4, generator=torch.Generator().manual_seed(1)).argsort(-1)
    weight = random(OUT, WIDTH) * (rank < 2).flatten(1)
    return (weight * 40).clamp(-127, 127).to(dtype) if dtype == torch.int8 else weight.to(dtype)


def case_in(dtype: torch.dtype = torch.bfloat16, tokens: int = 128) -> SearchCase:
    return SearchCase(dtype, dtype, OUT, WIDTH, tokens, None, False)


def searched(case: SearchCase, weight: Tensor | None = None) -> cusparselt_search.SearchResult:
    weight = weight_in(case.dtype) if weight is None else weight
    return search(case, compress(weight), lambda x: x.double() @ weight.double().t())


# ---- where it can run ---------------------------------------------------------------------------


MULTIPLES = "in {} needs out_features and in_features that are multiples of {}, got {}: pad the"


@pytest.mark.parametrize(
    ("shape", "dtype", "capability", "reason"),
    [
        ((16, 16), torch.bfloat16, (8, 0), None),
        ((48, 80), torch.float16, (12, 0), None),
        ((32, 96), torch.int8, (8, 0), None),
        ((24, 64), torch.bfloat16, (9, 0), MULTIPLES.format("bfloat16", 16, "24 x 64")),
        ((64, 24), torch.bfloat16, (9, 0), MULTIPLES.format("bfloat16", 16, "64 x 24")),
        ((0, 64), torch.float16, (9, 0), MULTIPLES.format("float16", 16, "0 x 64")),
        ((48, 64), torch.int8, (9, 0), MULTIPLES.format("int8", 32, "48 x 64")),
        ((64, 64), torch.float32, (9, 0), "one of bfloat16, float16, int8, got float32: cast"),
        ((64, 64), torch.float16, (7, 5), "capability 8.0, this GPU has 7.5: leave"),
        (
            (64, 64),
            torch.float8_e4m3fn,
            (9, 0),
            "one of bfloat16, float16, int8, got float8_e4m3fn: cast",
        ),
    ],
)
def test_where_it_can_run(
    shape: tuple[int, int],
    dtype: torch.dtype,
    capability: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    problem = why_not(shape, dtype, GPU)
    if reason is None:
        assert problem is None
    else:
        assert problem is not None and re.search(reason, problem)


def test_without_a_gpu_or_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not((64, 64), torch.bfloat16, CPU) == why_no_gpu(CPU)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    problem = why_not((64, 64), torch.bfloat16, GPU)
    assert problem is not None and f"built with it, got {torch.__version__}: install" in problem


# ---- the product --------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tokens_are_padded_and_cut(
    fake: Fake, dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dirty(self: Tensor, *shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=self.dtype)

    monkeypatch.setattr(Tensor, "new_empty", dirty)
    weight, x = weight_in(dtype), random(tokens, WIDTH, seed=3).to(dtype)
    kept = x.clone()
    y = multiply(compress(weight), x, OUT, Setting(2))
    assert torch.equal(y, (x.double() @ weight.double().t()).to(dtype))
    assert y.shape == (tokens, OUT) and y.is_contiguous() and torch.equal(x, kept)
    assert fake.seen == [Setting(2)] and fake.tokens == [-(-tokens // 16) * 16]
    assert fake.input is not None and not fake.input[tokens:].any()


def test_eight_bit_tokens_are_padded_to_32_and_scaled(fake: Fake) -> None:
    weight = weight_in(torch.int8)
    x = (random(5, WIDTH) * 50).clamp(-127, 127).to(torch.int8)
    alpha, bias = random(OUT).abs() / 1000, random(OUT, seed=1).bfloat16()
    y = multiply(compress(weight), x, OUT, Setting(1), bias, alpha, torch.bfloat16)
    exact = (x.double() @ weight.double().t()) * alpha + bias
    assert torch.equal(y, exact.bfloat16()) and fake.tokens == [32]
    sums = multiply(compress(weight), x, OUT, Setting(1), out_dtype=torch.int32)
    assert sums.dtype == torch.int32 and torch.equal(sums.double(), x.double() @ weight.double().T)


def test_any_memory_is_put_in_order(fake: Fake) -> None:
    weight, x, bias = weight_in(), random(16, WIDTH).bfloat16(), random(OUT).bfloat16()
    fake.us[Setting(0, 4, 2)] = 1.0
    y = multiply(compress(weight), x, OUT, Setting(0, 4, 2), bias)
    assert torch.equal(y, (x.double() @ weight.double().t() + bias).bfloat16())
    assert fake.seen == [Setting(0, 4, 2)]
    shifted = torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x)
    shifted_bias = torch.cat((bias[:1], bias))[1:]
    assert shifted.data_ptr() % 16 and shifted_bias.data_ptr() % 16
    assert torch.equal(multiply(compress(weight), shifted, OUT, Setting(1), shifted_bias), y)
    assert torch.equal(multiply(compress(weight), x.t().contiguous().t(), OUT, Setting(1), bias), y)
    assert torch.equal(compress(weight.t().contiguous().t()), weight)


# ---- cases and settings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "bucket"),
    [(1, 16), (16, 16), (17, 32), (32, 32), (1000, 1024), (16384, 16384), (10**5, 16384)],
)
def test_a_case_has_the_most_tokens_of_its_bucket(tokens: int, bucket: int) -> None:
    x = torch.empty(tokens, WIDTH, dtype=torch.bfloat16, device="meta")
    case = case_of(x, OUT)
    assert case == SearchCase(torch.bfloat16, torch.bfloat16, OUT, WIDTH, bucket, None, False)
    assert case.product == "bfloat16 32x64" and LARGEST_BUCKET == 16384


def test_a_case_knows_all_that_changes_the_kernel() -> None:
    x = torch.empty(3, WIDTH, dtype=torch.int8)
    bias, alpha = torch.empty(OUT, dtype=torch.float16), torch.empty(OUT)
    case = case_of(x, OUT, bias, alpha, torch.bfloat16)
    assert case == SearchCase(
        torch.int8, torch.bfloat16, OUT, WIDTH, 32, bias=torch.float16, alpha=True
    )
    assert case.product == "int8 to bfloat16 32x64 alpha bias float16"


def test_a_setting_is_read_as_it_was_written() -> None:
    for setting in (Setting(3), Setting(12, 8, 2)):
        assert Setting.parse(str(setting)) == setting
    assert str(Setting(3)) == "3,1,-1"
    for text in ("", "3", "3,1", "3,1,-1,0", "3,x,1"):
        with pytest.raises(ValueError):
            Setting.parse(text)


@pytest.mark.parametrize(
    "case",
    [
        case_in(),
        SearchCase(torch.int8, torch.float16, OUT, WIDTH, 32, torch.bfloat16, True),
        SearchCase(torch.int8, torch.int32, OUT, WIDTH, 32, None, False),
    ],
    ids=str,
)
def test_a_case_is_read_as_it_was_written(case: SearchCase) -> None:
    assert SearchCase.read(json.loads(json.dumps(case.written()))) == case


def test_an_algorithm_is_one_of_its_dtypes() -> None:
    assert case_in(torch.float16).dtypes == "float16"
    case = SearchCase(torch.int8, torch.float16, OUT, WIDTH, 32, torch.bfloat16, True)
    assert case.dtypes == "int8 to float16"


def test_the_allowed_error_follows_from_the_dtypes() -> None:
    assert allowed(case_in()) == 2**-7
    assert allowed(case_in(torch.float16)) == 2**-10
    sums = SearchCase(torch.int8, torch.int32, OUT, WIDTH, 32, None, False)
    assert allowed(sums) == 0


# ---- the search ---------------------------------------------------------------------------------


def test_the_fastest_right_algorithm_wins(fake: Fake) -> None:
    fake.us.update({Setting(4): 3.0, Setting(3): 2.0, Setting(2): 1.0, Setting(1): 0.5})
    fake.wrong.add(Setting(1))
    fake.unwritten.add(Setting(2))
    fake.few_wrong.add(Setting(3))
    found = searched(case_in())
    assert (found.setting, found.us) == (Setting(4), 3.0)
    for setting in (Setting(1), Setting(2), Setting(3)):
        assert found.dropped[setting].startswith("wrong by ")
    assert found.dropped[Setting(2)] == "wrong by nan where 7.8e-03 is allowed"
    assert "not supported" in found.dropped[Setting(6)]
    assert "Exception raised" not in found.dropped[Setting(6)]


def test_one_that_is_wrong_now_and_then_is_left_for_the_next(fake: Fake) -> None:
    fake.us[Setting(5)] = 1.0
    fake.now_and_then.add(Setting(5))
    found = searched(case_in())
    assert found.setting == Setting(0)
    assert found.dropped[Setting(5)].endswith("but not always")


def test_numbers_are_tried_until_some_in_a_row_are_refused(fake: Fake) -> None:
    del fake.us[Setting(1)], fake.us[Setting(2)], fake.us[Setting(3)]
    fake.us[Setting(9)] = 1.0  # behind three refused ones
    fake.us[Setting(14)] = 0.1  # behind four
    assert searched(case_in()).setting == Setting(9)
    assert max(setting.algorithm for setting in fake.seen) == 13


def test_the_two_fastest_are_tried_with_split_sums(fake: Fake) -> None:
    fake.us[Setting(3)] = 1.0
    for number in range(6):
        fake.us[Setting(number, 4, 2)] = 0.5 - number / 100
    assert searched(case_in()).setting == Setting(3, 4, 2)  # 5 is faster split, but not whole
    assert {setting.algorithm for setting in fake.seen if setting.split_k > 1} == {0, 3}
    tried = {(s.split_k, s.split_k_mode) for s in fake.seen if s.algorithm == 3}
    assert tried == {(1, -1)} | {(count, mode) for count in (2, 4, 8) for mode in (1, 2)}


def test_algorithms_are_compared_at_both_ends_of_the_bucket(fake: Fake) -> None:
    searched(case_in(tokens=128))
    assert set(fake.tokens[: fake.tokens.index(96)]) == {128, 80}
    fake.tokens.clear()
    searched(case_in(tokens=16))
    assert set(fake.tokens) == {16}


@pytest.mark.parametrize(
    ("dtype", "tokens", "counts"),
    [
        (torch.bfloat16, 16, [16]),
        (torch.bfloat16, 32, [32]),
        (torch.float16, 64, [48, 64]),
        (torch.bfloat16, 128, [80, 96, 112, 128]),
        (torch.int8, 32, [32]),
        (torch.int8, 128, [96, 128]),
    ],
    ids=str,
)
def test_the_fastest_is_right_at_every_number_of_tokens_that_it_serves(
    fake: Fake, dtype: torch.dtype, tokens: int, counts: list[int]
) -> None:
    out_dtype = torch.bfloat16 if dtype == torch.int8 else dtype
    case = SearchCase(dtype, out_dtype, OUT, WIDTH, tokens, None, False)
    assert list(case.counts) == counts
    served = range(tokens // 2 + 1, tokens + 1) if tokens > STEPS[dtype] else [1, tokens]
    step = STEPS[dtype]
    assert {-(-count // step) * step for count in served} == set(counts)
    searched(case)
    assert set(fake.tokens) == set(counts)


def test_one_that_is_wrong_in_the_middle_of_a_bucket_is_dropped(fake: Fake) -> None:
    fake.us[Setting(5)] = 1.0
    fake.wrong_at = {Setting(5): 96}
    found = searched(case_in(tokens=128))
    assert found.setting == Setting(0)
    assert found.dropped[Setting(5)].endswith("at 96 tokens")


@pytest.mark.parametrize("bias", [None, torch.bfloat16])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_codes_are_searched_with_their_scales_and_bias(
    fake: Fake, out_dtype: torch.dtype, alpha: bool, bias: torch.dtype | None
) -> None:
    fake.wrong.add(Setting(0))
    case = SearchCase(torch.int8, out_dtype, OUT, WIDTH, 64, bias, alpha)
    weight = weight_in(torch.int8) // 16  # so that float16 holds unscaled sums
    found = searched(case, weight)
    assert found.setting == Setting(1)
    assert all((given is None) == (bias is None) for given in fake.biases)
    assert bias is None or fake.biases[-1].dtype == bias


def test_int32_sums_have_to_be_exact(fake: Fake) -> None:
    fake.wrong.add(Setting(0))
    case = SearchCase(torch.int8, torch.int32, OUT, WIDTH, 64, None, False)
    assert searched(case).setting == Setting(1)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_weights_of_any_size_and_dead_outputs_are_searched(fake: Fake, scale: float) -> None:
    """float16 results of 1e-6 are rounded to a fixed spacing, not relative to themselves."""
    weight = weight_in().float() * scale
    weight[3] = 0
    weight[4] *= 1e-3
    found = searched(case_in(torch.float16), weight.half())
    assert found.setting == Setting(0) and len(found.dropped) == 4 + 12


def test_a_wrong_small_output_beside_large_ones_is_seen(fake: Fake) -> None:
    weight = weight_in()
    weight[:-5] *= 2**10  # the fake is wrong by 5 % in the last five outputs
    fake.wrong.add(Setting(0))
    assert searched(case_in(), weight).setting == Setting(1)


def test_results_are_compared_in_all_their_parts(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cusparselt_search, "ROWS_AT_ONCE", 32)
    fake.wrong.add(Setting(0))  # in the last rows
    fake.few_wrong.add(Setting(1))  # in the first one
    assert searched(case_in()).setting == Setting(2)


def test_without_a_right_algorithm_it_is_an_error(fake: Fake) -> None:
    fake.wrong.update(fake.us)
    with pytest.raises(
        RuntimeError, match=r"bfloat16 32x64 at 128 tokens, got none of 10: .*wrong by .*"
    ):
        searched(case_in())
    fake.us.clear()
    with pytest.raises(RuntimeError, match=r"got none of 4: let .* another .*not supported"):
        searched(case_in())


def test_the_fastest_few_are_timed_again_in_turns(fake: Fake) -> None:
    """What was fastest alone is not always; and nothing overtakes that was not among them."""
    alone = {Setting(n): 10.0 + n for n in range(6)}
    fake.us.clear()
    fake.us.update(alone)
    fake.in_turns = {Setting(0): 15.0, Setting(1): 14.0, Setting(2): 16.0, Setting(3): 20.0}
    found = searched(case_in())
    assert (found.setting, found.us) == (Setting(1), 14.0)


def test_a_failed_gpu_ends_the_search(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*arguments: object) -> float:
        raise torch.AcceleratorError("CUDA error: an illegal instruction was encountered")

    monkeypatch.setattr(cusparselt_search, "_us", failed)
    with pytest.raises(torch.AcceleratorError, match="illegal instruction"):
        searched(case_in())
    assert {setting.algorithm for setting in fake.seen} == {0}


def test_where_there_is_no_room_for_copies_the_blob_alone_is_timed(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    time = fake.time

    def counted(chains, device, rounds):  # type: ignore[no-untyped-def]
        counts.extend(len(calls) for calls in chains)
        return time(chains, device, rounds)

    def full(*arguments: object) -> int:
        raise MemoryError

    monkeypatch.setattr(cusparselt_search, "_us", counted)
    searched(case_in())
    assert set(counts) == {2}
    counts.clear()
    monkeypatch.setattr(cusparselt_search, "copies_on", full)
    assert searched(case_in()).setting == Setting(0) and set(counts) == {1}


def test_time_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    chain = [lambda: called.append(0), lambda: called.append(1)]
    one, other = cusparselt_search._us([chain, [lambda: None]], CPU, cusparselt_search.ROUNDS)
    assert one > 0 < other and called.count(0) >= cusparselt_search.ROUNDS
    assert abs(called.count(0) - called.count(1)) <= 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_neither_gradients_nor_autocast_change_the_search(fake: Fake, mode: type) -> None:
    weight = weight_in(torch.float16).requires_grad_()
    exact_dtypes = []

    def exact(x: Tensor) -> Tensor:
        result = x.float() @ weight.float().t()
        assert not result.requires_grad
        exact_dtypes.append(result.dtype)
        return result

    state = torch.get_rng_state()
    with mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = search(case_in(torch.float16), compress(weight.detach()), exact)
    assert found.setting == Setting(0) and set(exact_dtypes) == {torch.float32}
    assert torch.equal(torch.get_rng_state(), state)


# ---- what is remembered -------------------------------------------------------------------------


def setting_of(case: SearchCase) -> Setting:
    return setting_for(case, CPU)


def test_what_was_searched_is_remembered_for_good(fake: Fake, tmp_path: Path) -> None:
    fake.us[Setting(3)] = 1.0
    assert setting_of(case_in()) == Setting(3)
    count = len(fake.seen)
    assert setting_of(case_in()) == Setting(3) and len(fake.seen) == count
    forget()
    assert setting_of(case_in()) == Setting(3) and len(fake.seen) == count
    file = tmp_path / "cache" / "cusparselt.json"
    assert json.loads(file.read_text()) == {LIBRARY: {"bfloat16 32x64": {"128": "3,1,-1"}}}
    assert setting_of(case_in(tokens=256)) == Setting(3) and len(fake.seen) > count


def test_it_holds_for_one_chip_version_and_case(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_in()
    assert chosen(case, CPU) is None
    remember(case, CPU, Setting(2, 4, 1))
    assert chosen(case, CPU) == Setting(2, 4, 1)
    others = [
        case_in(tokens=64),
        case_in(torch.float16),
        SearchCase(torch.bfloat16, torch.bfloat16, 2 * OUT, WIDTH, 128, None, False),
        SearchCase(torch.bfloat16, torch.bfloat16, OUT, WIDTH, 128, torch.bfloat16, False),
        SearchCase(torch.int8, torch.bfloat16, OUT, WIDTH, 128, None, False),
        SearchCase(torch.bfloat16, torch.bfloat16, OUT, WIDTH, 128, None, True),
    ]
    assert [chosen(other, CPU) for other in others] == [None] * len(others)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 803)
    forget()
    assert chosen(case, CPU) is None


def test_a_wrong_search_remembers_nothing(fake: Fake, tmp_path: Path) -> None:
    fake.wrong.update(fake.us)
    with pytest.raises(RuntimeError, match="needs a right algorithm"):
        setting_of(case_in())
    assert chosen(case_in(), CPU) is None and not (tmp_path / "cache").exists()


def test_a_capture_never_searches(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"bfloat16 32x64 at up to 128 tokens, and .* call warmup\(model, "
    ):
        setting_of(case_in())
    assert fake.seen == []
    remember(case_in(), CPU, Setting(2))
    assert setting_of(case_in()) == Setting(2) and fake.seen == []


def test_a_broken_file_is_named(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "cusparselt.json"
    file.parent.mkdir()
    file.write_text(json.dumps({LIBRARY: {"bfloat16 32x64": {"128": "3,1"}}}))
    with pytest.raises(ValueError, match="a table of cuSPARSELt settings, got: .*'3,1': delete it"):
        setting_of(case_in())
    assert fake.seen == []


def test_what_cannot_be_written_is_remembered_until_the_end(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the folder's place")
    with pytest.warns(RuntimeWarning, match="cannot be kept .* set SECATEUR_CACHE"):
        assert setting_of(case_in()) == Setting(0)
    count = len(fake.seen)
    assert setting_of(case_in()) == Setting(0) and len(fake.seen) == count
    remember(case_in(), CPU, Setting(1))  # no second warning
    assert chosen(case_in(), CPU) == Setting(1)


def test_a_user_without_a_home_searches_in_every_process(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless(name: str) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cusparselt_settings, "own_file", homeless)
    with pytest.warns(RuntimeWarning, match="Could not determine home"):
        assert setting_of(case_in()) == Setting(0)
    assert chosen(case_in(), CPU) == Setting(0)


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(
    not torch.backends.cusparselt.is_available(), reason="needs a torch with cuSPARSELt"
)
@pytest.mark.parametrize("tokens", [1, 33, 1000])
@pytest.mark.parametrize(
    ("dtype", "out_dtype", "scaled"),
    [
        (torch.int8, torch.bfloat16, True),
        (torch.int8, torch.float16, True),
        (torch.int8, torch.bfloat16, False),
        (torch.int8, torch.int32, False),
    ],
    ids=str,
)
def test_codes_on_a_gpu(
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    scaled: bool,
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Searched, and then right for other inputs and scales than the search's own."""
    shape = (1024, 2048)
    problem = why_not(shape, dtype, torch.device("cuda", torch.cuda.current_device()))
    if problem is not None:
        pytest.skip(problem)
    generator = torch.Generator("cuda").manual_seed(0)
    rank = torch.rand(shape[0], shape[1] // 4, 4, device="cuda", generator=generator).argsort(-1)
    wide = torch.randn(shape, device="cuda", generator=generator) * (rank < 2).flatten(1) * 30
    weight = wide.clamp(-127, 127).to(dtype)
    x = torch.randn(tokens, shape[1], device="cuda", generator=generator) * 30
    x = x.clamp(-127, 127).to(dtype)
    alpha = torch.rand(shape[0], device="cuda", generator=generator) / 1e4 if scaled else None
    exact = x.double() @ weight.double().t() * (1 if alpha is None else alpha)
    blob, case = compress(weight), case_of(x, shape[0], None, alpha, out_dtype)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    monkeypatch.setattr(cusparselt_child, "MODULE", "tests.formats.kernels.small_child")
    found = search_isolated(case, x.device)
    cusparselt_child.end_child()
    y = multiply(blob, x, shape[0], found.setting, None, alpha, out_dtype)
    assert y.dtype == out_dtype and y.shape == exact.shape
    assert (y.double() - exact).abs().max() <= allowed(case) * exact.abs().max()
