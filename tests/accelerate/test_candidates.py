"""What is measured against what: names, bytes, separate copies, and who is admitted."""

import pytest
import torch
from torch import Tensor, nn

from secateur.accelerate.candidates import (
    Candidate,
    admitted,
    dense_candidates,
    runs,
    sparse_candidates,
)
from secateur.formats import parse_format
from secateur.formats.format import dequantised
from secateur.formats.kernels.gpu import why_no_gpu
from secateur.formats.pack import packed_linear
from tests.formats.weights import (
    QUANTISED,
    allowed_error,
    exact_linear,
    fitting_weight,
    tokens_in,
)

needs_mkl = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="this torch is built without MKL"
)


NO_GPU = why_no_gpu(torch.device("cpu"))


def linear(format: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(24, 16, bias=bias, dtype=dtype)
    layer.weight.data.copy_(fitting_weight(format, 16, 24, dtype))
    if bias:
        layer.bias.data.copy_(tokens_in(16, seed=3))
    return layer.requires_grad_(False)


@needs_mkl
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 5])
def test_dense_is_measured_eager_and_prepacked(tokens: int, bias: bool) -> None:
    layer = linear("csr", bias=bias)
    candidates = dense_candidates(layer, tokens)
    assert [entry.name for entry in candidates] == ["dense", "dense prepacked"]
    assert [entry.nbytes for entry in candidates] == [16 * 24 * 4] * 2
    x = tokens_in(tokens, 24)
    exact, allowed = (
        exact_linear(x, layer.weight, layer.bias),
        allowed_error(x, layer.weight, layer.bias),
    )
    for entry in candidates:
        assert float((entry.make()(x) - exact).abs().max()) <= allowed


def test_no_prepacked_dense_in_16_bits() -> None:
    names = [entry.name for entry in dense_candidates(linear("csr", torch.bfloat16), 1)]
    assert names == ["dense"]


@pytest.mark.usefixtures("no_cpu_kernels")
@pytest.mark.parametrize(
    ("format", "names", "why"),
    [  # decode and prefill say the same, and reports say it once
        ("block:4x8", ["block:4x8 cpu"], [NO_GPU, NO_GPU, "SECATEUR_CPU_BODY is none"]),
        ("csr", ["csr torch_csr"], []),
        ("bitmap", [], [NO_GPU, NO_GPU]),
    ],
)
def test_the_reference_is_no_candidate(format: str, names: list[str], why: list[str]) -> None:
    found, reasons = sparse_candidates(linear(format), parse_format(format), 3)
    assert [entry.name for entry in found] == names
    assert reasons == why


def test_what_cannot_run_says_why() -> None:
    found, reasons = sparse_candidates(linear("csr", torch.float16), parse_format("csr"), 1)
    assert not found and "got torch.float16" in reasons[0]


@pytest.mark.usefixtures("no_cpu_kernels")
def test_a_candidate_runs_its_own_implementation_on_its_own_copy() -> None:
    layer = linear("block:4x8")
    (candidate,), _ = sparse_candidates(layer, parse_format("block:4x8"), 3)
    first, second = runs([candidate], 2)["block:4x8 cpu"]
    assert first.dispatch == "cpu<=3 reference"  # type: ignore[attr-defined]
    x = tokens_in(3, 24)
    expected = second(x)
    first.packed["values"].zero_()  # type: ignore[attr-defined]
    assert torch.equal(second(x), expected)
    assert torch.allclose(expected, layer(x), atol=1e-5)
    assert candidate.nbytes == second.nbytes  # type: ignore[attr-defined]


def wrong(x: Tensor) -> Tensor:
    return torch.full((x.shape[0], 16), 0.5)


def not_a_number(x: Tensor) -> Tensor:
    return torch.full((x.shape[0], 16), torch.nan)


def failing(x: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("out of memory: 3 GiB\nand a long trace")


def misused(x: Tensor) -> Tensor:
    raise ValueError


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (wrong, "candidate is wrong by "),
        (not_a_number, "candidate is wrong by nan where "),
        (failing, "candidate ran out of memory: out of memory: 3 GiB"),
        (misused, "candidate failed: ValueError"),
    ],
)
def test_wrong_and_failing_candidates_are_dropped(run: object, reason: str) -> None:
    layer, x = linear("csr"), tokens_in(3, 24)
    good = dense_candidates(layer, 3)[0]
    kept, reasons = admitted([Candidate("candidate", lambda: run, {}, ()), good], layer, x)  # type: ignore[arg-type,return-value]
    assert [entry.name for entry in kept] == ["dense"]
    assert len(reasons) == 1 and reasons[0].startswith(reason) and "\n" not in reasons[0]


@pytest.mark.parametrize("rows_at_once", [5, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("factor", "count"), [(0.99, 1), (1.01, 0)])
def test_the_budget_is_a_sharp_line(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    factor: float,
    count: int,
    rows_at_once: int,
) -> None:
    monkeypatch.setattr("secateur.accelerate.candidates.ROWS_AT_ONCE", rows_at_once)
    layer, x = linear("csr", dtype), tokens_in(3, 24, dtype=dtype)
    exact = exact_linear(x, layer.weight, layer.bias)
    off = factor * allowed_error(x, layer.weight, layer.bias)
    candidate = Candidate("candidate", lambda: lambda x: exact + off, {}, ())
    assert len(admitted([candidate], layer, x)[0]) == count


def test_interruption_is_no_reason_to_go_on() -> None:
    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        admitted([Candidate("c", lambda: interrupted, {}, ())], linear("csr"), tokens_in(3, 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", QUANTISED)
def test_a_quantised_candidate_is_held_to_its_rounded_weight(
    format: str, dtype: torch.dtype
) -> None:
    layer, x = linear("semi24", dtype), tokens_in(64, 24, dtype=dtype)
    packed = packed_linear("", layer, parse_format(format))
    mine = Candidate("mine", lambda: packed, {}, (), packed.packed)
    strict = Candidate("strict", lambda: packed, {}, ())
    own = dense_candidates(layer, 3)[0]
    kept, reasons = admitted([mine, strict, own], layer, x)
    assert [entry.name for entry in kept if entry is not strict] == ["mine", "dense"]
    if dtype == torch.float32:  # bfloat16 itself rounds as much as int8 does
        assert len(reasons) == 1 and reasons[0].startswith("strict is wrong by ")
    exact = exact_linear(x, dequantised(packed.packed), layer.bias)
    packed.use((("reference", None),))
    usual = float((packed(x) - exact).detach().abs().max())  # what the format itself is off
    magnitude = float((x.double().abs() @ dequantised(packed.packed).double().abs().t()).max())
    band = torch.finfo(dtype).eps * float(exact.abs().max()) + 2**-23 * magnitude
    off = 2 * (usual + band)
    for factor, count in ((0.99, 1), (1.01, 0)):
        shifted = exact + factor * off
        candidate = Candidate("c", lambda shifted=shifted: lambda x: shifted, {}, (), packed.packed)
        assert len(admitted([candidate], layer, x)[0]) == count
