"""Statistics against float64, and what a function's parameters ask for."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur as sc
from secateur.model.statistics import (
    STATISTICS,
    is_held_out,
    name_of,
    needed_by,
)


def test_sums_over_batches_equal_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 12, generator=generator) for n in (5, 1, 30)]
    rows, held = torch.cat(batches).double(), batches[1].double()
    expected = {
        "input_norm": rows.square().sum(0).sqrt(),
        "gram": rows.T @ rows / 36,
        "held_gram": held.T @ held / 36,
    }
    assert STATISTICS.keys() == expected.keys()
    for name, make in STATISTICS.items():
        statistic = make(12, torch.device("cpu"))
        for i, batch in enumerate(batches):
            statistic.update(batch, i)
        torch.testing.assert_close(
            statistic.value(36).double(), expected[name], rtol=1e-5, atol=1e-6
        )


def test_of_one_batch_nothing_is_held_out_and_of_many_one_in_eight() -> None:
    for batches, held in ((1, []), (2, [1]), (9, [1]), (18, [1, 9, 17])):
        statistic = STATISTICS["held_gram"](batches, torch.device("cpu"))
        for i, row in enumerate(torch.eye(batches)):
            statistic.update(row[None], i)
        expected = torch.zeros(batches).index_fill(0, torch.tensor(held, dtype=torch.int64), 1.0)
        assert torch.equal(statistic.value(1), expected.diag())
        assert [b for b in range(batches) if is_held_out(b)] == held


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    """4096 squares of 200 overflow float16 and stall in bfloat16."""
    rows = torch.full((4096, 2), 200.0, dtype=dtype)
    for name, expected in (("input_norm", 200.0 * 64), ("gram", 200.0**2)):
        statistic = STATISTICS[name](2, torch.device("cpu"))
        statistic.update(rows, 0)
        value = statistic.value(4096)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, torch.full_like(value, expected))


class OnGpu(Tensor):
    """Rows that claim to be on a GPU, with torch's product for such rows, which CPUs lack."""

    is_cuda = True

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.mm:
            assert kwargs == {"out_dtype": torch.float32}
            assert args[0].dtype in (torch.bfloat16, torch.float16)
            products.append(args[0].dtype)
            one, other = (a.as_subclass(Tensor).float() for a in args)
            return one @ other
        return super().__torch_function__(func, types, args, kwargs or {})


products: list[torch.dtype] = []


@pytest.fixture(params=[False, True])
def in_float16(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Set whether float16 products may be summed in float16."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_fp16_accumulation = matmul.allow_fp16_accumulation, request.param
    yield request.param
    matmul.allow_fp16_accumulation = before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_16_bit_rows_stay_16_bits_on_a_gpu(dtype: torch.dtype, in_float16: bool) -> None:
    """Except float16 where torch would refuse that product."""
    products.clear()
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    statistic = STATISTICS["gram"](6, torch.device("cpu"))
    for batch in rows.split(10):
        statistic.update(batch.as_subclass(OnGpu), 0)
    value = statistic.value(20)
    torch.testing.assert_close(value.double(), rows.double().T @ rows.double() / 20)
    as_they_are = dtype == torch.bfloat16 or (dtype == torch.float16 and not in_float16)
    assert products == ([dtype] * 2 if as_they_are else [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_rows_are_summed_in_float32_on_a_gpu(dtype: torch.dtype) -> None:
    """Each of n additions errs by at most 2^-23 of the sum of magnitudes, rounded or cut.

    Sums kept in 16 bits would miss the diagonal by 2^-9 (bfloat16) or overflow (float16).
    """
    n, batches = 512, 2
    generator = torch.Generator().manual_seed(0)
    rows = (20 * torch.randn(n, 200, generator=generator)).to(dtype).cuda()
    statistic = STATISTICS["gram"](200, torch.device("cuda"))
    for batch in rows.split(n // batches):
        statistic.update(batch, 0)
    exact = rows.double()
    allowed = (n + batches) * 2**-23 * (exact.abs().T @ exact.abs())
    error = (statistic.value(1).double() - exact.T @ exact).abs()
    assert (error <= allowed).all()


def test_parameters_are_the_declaration() -> None:
    assert needed_by(sc.wanda, ("weight",)) == ("input_norm",)
    assert needed_by(sc.magnitude, ("weight",)) == ()
    assert needed_by(sc.sparsegpt, ("weight", "pattern")) == ("gram",)
    assert needed_by(functools.partial(sc.sparsegpt, damping=1.0), ("weight", "pattern")) == (
        "gram",
    )
    assert needed_by(sc.alps, ("weight", "pattern")) == ("gram", "held_gram")  # with its default
    with pytest.raises(ValueError, match="random asks for 'layer_seed', which is no statistic"):
        needed_by(sc.criteria.random, ("weight",))


def test_names_of_functions_partials_and_callables() -> None:
    assert name_of(sc.wanda) == "wanda"
    assert name_of(functools.partial(sc.sparsegpt, damping=0.1)) == "sparsegpt(damping=0.1)"
    assert name_of(sc.NM) == "NM"
