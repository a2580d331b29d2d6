"""`accelerate_`: what is chosen from which times, what stays untouched, and what the report says.

The clock is injected, so that nothing here depends on how fast this machine is.
"""

import json
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from secateur import accelerate
from secateur.accelerate import _accelerate, accelerate_
from secateur.accelerate_report import AccelerateReport
from secateur.formats import SparseLinear, candidates
from secateur.formats.candidates import Candidate
from secateur.formats.format import Format, parse_format, weight_error
from secateur.formats.pack import packed_linear
from secateur.kernels.timing import Calls, Timing
from tests.formats.weights import fitting_weight, tokens_in

Times = Mapping[str, float] | Callable[[int, str], float]
FORMATS = ("semi24", "block:4x8", "csr")
FAST = {"dense": 100.0, "dense prepacked": 90.0, "block:4x8 cpu": 30.0, "csr torch_csr": 200.0}


class Clock:
    """A timer that gives the prescribed microseconds and remembers what it was asked."""

    def __init__(self, times: Times) -> None:
        self.times = times
        self.asked: list[tuple[int, tuple[str, ...]]] = []

    def __call__(self, variants: Mapping[str, Calls], device: torch.device) -> dict[str, Timing]:
        tokens = {call().shape[0] for calls in variants.values() for call in calls}  # type: ignore[attr-defined]
        (count,) = tokens  # every copy of every variant was called with the same tokens
        self.asked.append((count, tuple(variants)))
        return {name: self._timing(count, name) for name in variants}

    def _timing(self, count: int, name: str) -> Timing:
        time = self.times[name] if isinstance(self.times, Mapping) else self.times(count, name)
        return Timing(median_us=time, low_us=time, high_us=time, rounds=20)


def linear(format: str | None = "block:4x8", out: int = 16, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(24, out)
    if format is not None:
        layer.weight.data.copy_(fitting_weight(format, out, 24, seed=seed))
    return layer


def run(
    model: nn.Module,
    times: Times,
    tokens: Sequence[int] = (1, 16),
    layers: Sequence[str] | None = None,
    strict: bool = False,
) -> tuple[AccelerateReport, Clock]:
    clock = Clock(times)
    return _accelerate(model, tokens, FORMATS, layers, strict, clock), clock


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.children()]


def test_a_faster_layer_is_swapped_and_computes_the_same() -> None:
    model, x = nn.Sequential(linear(), nn.ReLU()), tokens_in(5, 24)
    expected = model(x)
    report, clock = run(model, FAST)
    assert kinds(model) == [SparseLinear, nn.ReLU]
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert model[0].dispatch == "cpu"
    names = ("dense", "dense prepacked", "block:4x8 cpu", "csr torch_csr")
    assert clock.asked == [(1, names), (16, names)]
    (layer,) = report.layers
    assert (layer.layer, layer.shape, layer.format) == ("0", (16, 24), "block:4x8")
    assert layer.reason == "faster than dense at every number of tokens"
    assert layer.bytes_before == 16 * 24 * 4
    stored = sum(tensor.nbytes for tensor in model[0].packed.tensors().values())
    assert layer.bytes_after == model[0].nbytes > stored  # with what the implementation arranged
    assert [entry.tokens for entry in layer.measured] == [1, 16]
    assert layer.measured[0].ratio_to("dense") == pytest.approx(100 / 30)
    assert layer.measured[0].ratio == pytest.approx(90 / 30)


@pytest.mark.parametrize(
    ("change", "swapped"),
    [
        ({}, True),
        ({"dense prepacked": 30.0}, False),  # prepacked wins: eager alone is no baseline
        ({"dense": 30.0}, False),
        ({"block:4x8 cpu": 85.0}, True),  # 90 / 85 is 1.06
        ({"block:4x8 cpu": 86.5}, False),  # 90 / 86.5 is 1.04: within the noise
        ({"block:4x8 cpu": 200.0, "csr torch_csr": 30.0}, True),
    ],
)
def test_only_a_clear_gain_over_both_denses_swaps(change: dict[str, float], swapped: bool) -> None:
    model = nn.Sequential(linear())
    report, _ = run(model, FAST | change)
    assert kinds(model) == [SparseLinear if swapped else nn.Linear]
    assert len(report.sparse) == swapped


def test_every_number_of_tokens_has_to_gain() -> None:
    model = nn.Sequential(linear())
    report, _ = run(model, lambda tokens, name: 89.0 if tokens == 16 else FAST[name])
    assert kinds(model) == [nn.Linear]
    assert report.layers[0].reason == "at 16 tokens block:4x8 cpu is 1.00x of the best dense"
    assert report.layers[0].bytes_after == report.layers[0].bytes_before
    assert "the model is unchanged" in str(report)


def test_the_format_with_the_larger_gain_over_all_tokens_wins() -> None:
    def times(tokens: int, name: str) -> float:
        return {"csr torch_csr": 10.0 if tokens == 1 else 80.0}.get(name, FAST[name])

    model = nn.Sequential(linear())
    report, _ = run(model, times)  # csr gains 9 x 1.1, block 3 x 3
    assert report.layers[0].format == "csr"
    assert model[0].dispatch == "torch_csr"
    assert report.layers[0].measured[1].fastest_sparse == "csr torch_csr"


def test_alike_layers_are_measured_once() -> None:
    model = nn.Sequential(*[linear() for _ in range(3)], linear(out=32), linear(None))
    report, clock = run(model, FAST, tokens=(4,))
    assert [count for count, _ in clock.asked] == [4, 4]
    assert [layer.measured_on for layer in report.layers] == ["0", "0", "0", "3", "4"]
    assert kinds(model) == [SparseLinear] * 4 + [nn.Linear]
    for layer in list(model)[:3]:
        assert torch.equal(layer.weight, fitting_weight("block:4x8", 16, 24))


def test_layers_of_another_density_are_not_alike() -> None:
    first, other = linear(), linear()
    other.weight.data[int(first.weight.any(1).nonzero()[0])] = 0  # one row of the first block
    other.weight.data[int(first.weight.any(1).nonzero()[-1])] = 0
    _, clock = run(nn.Sequential(first, other), FAST, tokens=(4,))
    names = ("dense", "dense prepacked", "block:4x8 cpu", "csr torch_csr")
    assert clock.asked == [(4, names), (4, names)]  # the same formats, so density alone differs


def test_what_does_not_fit_says_why() -> None:
    tied = nn.Embedding(16, 24)
    model = nn.Sequential(linear(None), linear("semi24"), linear(), tied)
    tied.weight = model[2].weight
    report, clock = run(model, FAST)
    dense, semi, shared = report.layers
    assert dense.reason == "its weight has no zeros"
    assert semi.reason.startswith("the decode kernel needs a CUDA GPU, the weight is on cpu")
    assert shared.reason.startswith("its weight is tied to '3'")
    assert kinds(model) == [nn.Linear] * 3 + [nn.Embedding]
    assert clock.asked == [(1, ("dense", "dense prepacked")), (16, ("dense", "dense prepacked"))]


def test_misfits_of_all_formats_are_given() -> None:
    model = nn.Sequential(linear(None))
    model[0].weight.data[0, 0] = 0
    report, clock = run(model, FAST)
    reason = report.layers[0].reason
    assert "semi24 needs at most 2 nonzeros" in reason and "no 4x8 block is zero" in reason
    assert "csr would store" in reason and not clock.asked


def test_a_wrong_candidate_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    found = candidates.sparse_candidates

    def spoilt(*args: object) -> tuple[list[Candidate], list[str]]:
        entries, reasons = found(*args)  # type: ignore[arg-type]
        twice: Callable[[Candidate], Candidate] = lambda entry: Candidate(  # noqa: E731
            entry.name, lambda: lambda x: 2 * entry.make()(x), entry.nbytes
        )
        return [twice(e) if "block" in e.name else e for e in entries], reasons

    monkeypatch.setattr("secateur.accelerate.sparse_candidates", spoilt)
    model = nn.Sequential(linear())
    report, clock = run(model, FAST)
    assert kinds(model) == [nn.Linear]
    assert "block:4x8 cpu" not in clock.asked[0][1]
    assert "block:4x8 cpu is wrong by" in report.layers[0].reason
    assert "csr torch_csr is 0.45x" in report.layers[0].reason


class Stopping:
    """FAST, until the second layer is measured: by then the first is known to gain."""

    def __init__(self, problem: BaseException) -> None:
        self.problem = problem
        self.calls = 0

    def __call__(self, tokens: int, name: str) -> float:
        self.calls += 1
        if self.calls > 10:
            raise self.problem
        return FAST[name]


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), AssertionError()], ids=repr)
def test_an_interruption_changes_nothing(problem: BaseException) -> None:
    model = nn.Sequential(linear(), linear(out=32))
    weights = [layer.weight for layer in model]
    with pytest.raises(type(problem)):
        run(model, Stopping(problem))
    assert kinds(model) == [nn.Linear, nn.Linear]
    assert all(layer.weight is weight for layer, weight in zip(model, weights, strict=True))


def test_a_layer_that_there_is_no_room_to_measure_stays_dense() -> None:
    model = nn.Sequential(linear(), linear(out=32))
    report, _ = run(model, Stopping(torch.OutOfMemoryError("out of memory: 3 GiB\na trace")))
    assert kinds(model) == [SparseLinear, nn.Linear]
    assert report.layers[1].reason == "could not be measured: out of memory: 3 GiB"


def test_strict_demands_a_gain_somewhere() -> None:
    slow = FAST | {"block:4x8 cpu": 500.0}
    model = nn.Sequential(linear())
    with pytest.raises(ValueError, match="with strict needs a gain, got none: no layer is faster"):
        run(model, slow, strict=True)
    assert kinds(model) == [nn.Linear]
    run(nn.Sequential(linear(), linear(None)), FAST, strict=True)


def test_strict_demands_a_gain_of_every_listed_layer() -> None:
    model = nn.Sequential(linear(), linear(None))
    with pytest.raises(ValueError, match=r"needs every listed layer to gain, '1' does not \(its w"):
        run(model, FAST, layers=["0", "1"], strict=True)
    assert kinds(model) == [nn.Linear, nn.Linear]


def test_only_listed_layers_are_touched() -> None:
    model = nn.Sequential(linear(), linear())
    report, _ = run(model, FAST, layers=["1"])
    assert kinds(model) == [nn.Linear, SparseLinear]
    assert [layer.layer for layer in report.layers] == ["1"]


@pytest.mark.parametrize("tokens", [(), (0,), (1, -4), (1.5,), (True,)])
def test_other_tokens_are_refused(tokens: tuple[int, ...], unchecked: None) -> None:
    with pytest.raises(ValueError, match="accelerate_ needs numbers of tokens from 1 upwards, got"):
        accelerate_(nn.Sequential(linear()), tokens=tokens)


def test_other_arguments_are_refused() -> None:
    model = nn.Sequential(linear())
    with pytest.raises(ValueError, match="unknown format 'semi42'"):
        accelerate_(model, formats=["semi42"])
    with pytest.raises(ValueError, match="no layer is named 'x'"):
        accelerate_(model, layers=["x"])
    with pytest.raises(ValueError, match="needs a model with nn.Linear layers, got none"):
        accelerate_(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="a model that holds its layers, got a bare Linear"):
        accelerate_(linear())


def test_tokens_are_sorted_and_counted_once() -> None:
    report, clock = run(nn.Sequential(linear()), FAST, tokens=(16, 1, 16))
    assert report.tokens == (1, 16) and [count for count, _ in clock.asked] == [1, 16]


def test_gradients_and_mode_survive() -> None:
    model = nn.Sequential(linear()).eval()
    run(model, FAST)
    assert not model[0].training and model[0].bias.requires_grad
    x = tokens_in(2, 24).requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and bool(x.grad.any())


def test_the_printed_report() -> None:
    model = nn.Sequential(linear(), linear(), linear(None))
    report, _ = run(model, FAST)
    lines = str(report).splitlines()
    assert lines[0] == (
        "2 of 3 layers run sparse, each faster than dense at tokens 1, 16; "
        "their weights take 0.0 MB instead of 0.0 MB"
    )
    heads = "layer shape tokens eager us prepacked us sparse us fastest sparse vs eager"
    assert lines[2].split() == f"{heads} vs prepacked runs".split()
    cells = ["0", "16x24", "1", "100", "90", "30", "block:4x8", "cpu", "3.33x", "3.00x"]
    assert lines[3].split() == [*cells, "block:4x8"]
    assert lines[4].split()[2] == "16" and len(lines) == 7
    assert lines[5] == "0 and 1 more: block:4x8: faster than dense at every number of tokens"
    assert lines[6] == "2: dense: its weight has no zeros"


def test_a_report_without_gain_says_so_first() -> None:
    report, _ = run(nn.Sequential(linear(None)), FAST, tokens=(1,))
    assert str(report).startswith(
        "no layer is faster sparse on this device at tokens 1: the model is unchanged\n"
    )


def test_rows_match_the_columns_and_json_holds_everything() -> None:
    report, _ = run(nn.Sequential(linear(), linear()), FAST)
    rows = report.rows()
    assert len(rows) == 4 and all(len(row) == len(report.columns) for row in rows)
    assert [row[0] for row in rows] == ["0", "0", "1", "1"]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["headline"] == report.headline and data["tokens"] == [1, 16]
    assert data["layers"][1]["measured"][0]["microseconds"][0] == ["dense", 100.0]


def test_many_reasons_are_counted_not_listed() -> None:
    model = nn.Sequential(*[linear(out=8 * number) for number in range(1, 12)])
    slow = iter(map(float, range(200, 999, 10)))

    def times(tokens: int, name: str) -> float:
        return {"block:4x8 cpu": next(slow), "csr torch_csr": 9999.0}.get(name, FAST[name])

    report, _ = run(model, times, tokens=(1,))
    lines = str(report).splitlines()
    assert len({layer.reason for layer in report.layers}) == 11
    assert lines[-1] == "... and 3 more reasons, in .layers"
    assert lines[-2].startswith("7: dense: at 1 token ")


def test_it_really_runs() -> None:
    """With the real timer; whatever it decides, results stay right and the report is whole."""
    model, x = nn.Sequential(linear(), linear(None)), tokens_in(3, 24)
    expected: list[Tensor] = [layer(x) for layer in model]
    report = accelerate_(model, tokens=(1, 3), formats=FORMATS)
    assert [layer.layer for layer in report.layers] == ["0", "1"]
    names = {name for entry in report.layers[0].measured for name, _ in entry.microseconds}
    assert {"dense", "block:4x8 cpu", "csr torch_csr"} <= names
    assert all(us > 0 for entry in report.layers[0].measured for _, us in entry.microseconds)
    for layer, before in zip(model, expected, strict=True):
        assert torch.allclose(layer(x), before, atol=1e-5)


def test_formats_that_round_are_opted_into() -> None:
    assert all(parse_format(name).is_exact for name in accelerate.DEFAULT_FORMATS)


def test_a_quantised_layer_says_how_far_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference stands in for a kernel: it is no candidate otherwise."""

    def candidates_of(
        layer: nn.Linear, format: Format, tokens: int
    ) -> tuple[list[Candidate], list[str]]:
        packed = packed_linear("", layer, format)
        return [Candidate(f"{format} reference", lambda: packed, 0, packed.packed)], []

    monkeypatch.setattr(accelerate, "sparse_candidates", candidates_of)
    model = nn.Sequential(linear("semi24"), linear("semi24", seed=1))
    weights = [layer.weight.detach().clone() for layer in model]
    times = FAST | {"semi24_int4 reference": 10.0}
    report = _accelerate(model, (1,), ("semi24_int4",), None, False, Clock(times))
    assert [str(layer.format) for layer in model] == ["semi24_int4"] * 2
    errors = [layer.weight_error for layer in report.layers]
    for layer, weight, error in zip(model, weights, errors, strict=True):
        assert error == weight_error(weight, layer.packed) > 0.01
    assert f"rounded by up to {max(errors):.1%}" in report.headline
    assert report.rows()[1][-1] == f"semi24_int4, {errors[1]:.1%} off"
    assert report.to_dict()["layers"][0]["weight_error"] == errors[0]
