"""`accelerate_`: what is chosen from which times, what stays untouched, and what the report says.

The clock is injected, so that nothing here depends on how fast this machine is.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from secateur.accelerate import candidates, choices
from secateur.accelerate import measurements as remembered
from secateur.accelerate import verb as accelerate
from secateur.accelerate.candidates import Candidate
from secateur.accelerate.layer_report import OtherPolicy
from secateur.accelerate.report import AccelerateReport
from secateur.accelerate.tokens import Tokens
from secateur.accelerate.verb import DEFAULT_FORMATS, _accelerate, _groups, accelerate_
from secateur.core.tables import as_bytes
from secateur.core.undo import Undo
from secateur.formats import SparseLinear
from secateur.formats.contract import Arrangement, Format, Packed
from secateur.formats.format import parse_format, weight_error
from secateur.formats.kernels.cubins import warn_unkept
from secateur.formats.kernels.gpu import why_no_gpu
from secateur.formats.kernels.timing import Calls, Timing, VariantFailed
from tests import toy
from tests.formats.weights import fitting_weight, tokens_in

# A stand-in clock times plain torch's candidates.
pytestmark = pytest.mark.usefixtures("no_cpu_kernels")

Times = Mapping[str, float] | Callable[[int, str], float]
FORMATS = ("semi24", "block:4x8", "csr")
FAST = {"dense": 100.0, "dense prepacked": 90.0, "block:4x8 cpu": 30.0, "csr torch_csr": 200.0}


class Clock:
    """A timer that gives the prescribed microseconds and remembers what it was asked."""

    def __init__(self, times: Times, spread: float = 0.0) -> None:
        self.times, self.spread = times, spread
        self.asked: list[tuple[int, tuple[str, ...]]] = []

    def __call__(self, variants: Mapping[str, Calls], device: torch.device) -> dict[str, Timing]:
        tokens = {call().shape[0] for calls in variants.values() for call in calls}  # type: ignore[attr-defined]
        (count,) = tokens  # every copy of every variant was called with the same tokens
        self.asked.append((count, tuple(variants)))
        return {name: self._timing(count, name) for name in variants}

    def _timing(self, count: int, name: str) -> Timing:
        time = self.times[name] if isinstance(self.times, Mapping) else self.times(count, name)
        high = time * (1 + self.spread)
        return Timing(median_us=time, low_us=time, high_us=high, rounds=20)


def linear(format: str | None = "block:4x8", out: int = 16, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(24, out)
    if format is not None:
        layer.weight.data.copy_(fitting_weight(format, out, 24, seed=seed))
    return layer


def run(
    model: nn.Module,
    times: Times,
    tokens: Tokens = (1, 16),
    layers: Sequence[str] | None = None,
    strict: bool = False,
    formats: Sequence[str | Format] = FORMATS,
    policy: choices.Policy = "fastest",
    remeasure: bool = False,
) -> tuple[AccelerateReport, Clock]:
    clock = Clock(times)
    report = _accelerate(Undo(), model, tokens, formats, layers, strict, clock, policy, remeasure)
    return report, clock


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
    stored = sum(tensor.nbytes for tensor in model[0].packed.tensors.values())
    assert (layer.bytes_after, layer.stored) == (model[0].nbytes, stored)
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


def test_no_number_of_tokens_may_lose() -> None:
    def times(tokens: int, name: str) -> float:
        return 96.0 if tokens == 16 and "dense" not in name else FAST[name]

    model = nn.Sequential(linear())
    report, _ = run(model, times)
    assert kinds(model) == [nn.Linear]
    others = f"{why_no_gpu(torch.device('cpu'))}; SECATEUR_CPU_BODY is none"
    assert report.layers[0].reason == (
        f"at 16 tokens block:4x8 cpu is 0.94x of the best dense; {others}; "
        "leave 16 out of tokens= and it runs block:4x8, 3.00x at 1 token; at 16 tokens it then "
        "runs block:4x8 cpu, 0.94x of dense"
    )
    assert report.layers[0].bytes_after == report.layers[0].bytes_before
    assert "the model is unchanged" in str(report)


def test_as_fast_within_noise_at_some_tokens_is_enough() -> None:
    model = nn.Sequential(linear())
    report, _ = run(model, lambda tokens, name: 92.0 if tokens == 16 else FAST[name])
    assert kinds(model) == [SparseLinear]
    assert report.layers[0].reason == "faster than dense at tokens 1, as fast at 16"
    assert "each faster than dense or as fast at tokens 1, 16" in report.headline


@pytest.mark.parametrize(
    ("tokens", "format"),
    [((1, 16), "block:4x8"), ({1: 9, 16: 1}, "csr"), ({1: 1, 16: 9}, "block:4x8")],
)
def test_the_format_with_the_shortest_day_wins(tokens: Tokens, format: str) -> None:
    """At 1 and 16 tokens dense takes 90 us and block 30, csr 10 and 80."""

    def times(tokens: int, name: str) -> float:
        return {"csr torch_csr": 10.0 if tokens == 1 else 80.0}.get(name, FAST[name])

    model = nn.Sequential(linear())
    report, _ = run(model, times, tokens)
    assert report.layers[0].format == format
    assert model[0].dispatch == ("torch_csr" if format == "csr" else "cpu")
    assert report.layers[0].measured[1].fastest_sparse == f"{format} {model[0].dispatch}"


def test_how_often_is_no_part_of_what_is_remembered() -> None:
    run(nn.Sequential(linear()), FAST, {1: 1000, 16: 1})
    report, clock = run(nn.Sequential(linear()), FAST, {1: 1, 16: 3})
    assert clock.asked == [] and (report.tokens, report.often) == ((1, 16), (1.0, 3.0))
    assert "; 1 token in 25 % of all calls, 16 tokens in 75 % of all calls" in str(report)


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
    on_a_gpu = why_no_gpu(torch.device("cpu"))  # once for all of its kernels
    assert semi.reason == f"{on_a_gpu}; SECATEUR_CPU_BODY is none"
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
    found = candidates.packed_candidates

    def spoilt(*args: object) -> tuple[list[Candidate], list[str]]:
        entries, reasons = found(*args)  # type: ignore[arg-type]
        twice: Callable[[Candidate], Candidate] = lambda entry: Candidate(  # noqa: E731
            entry.name, lambda: lambda x: 2 * entry.make()(x), entry.holds, entry.reads
        )
        return [twice(e) if "block" in e.name else e for e in entries], reasons

    monkeypatch.setattr("secateur.accelerate.verb.packed_candidates", spoilt)
    model = nn.Sequential(linear())
    report, clock = run(model, FAST)
    assert kinds(model) == [nn.Linear]
    assert "block:4x8 cpu" not in clock.asked[0][1]
    assert "block:4x8 cpu is wrong by" in report.layers[0].reason
    assert "csr torch_csr is 0.45x" in report.layers[0].reason


class Stopping:
    """FAST, until the second layer is measured: by then the first is known to gain."""

    def __init__(self, problem: BaseException, after: int = 10) -> None:
        self.problem = problem
        self.left = after

    def __call__(self, tokens: int, name: str) -> float:
        self.left -= 1
        if self.left < 0:
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
    run(nn.Sequential(linear(), linear(None)), FAST, strict=True, remeasure=True)


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


@pytest.mark.parametrize("tokens", [(), (0,), {}, {1: 1, 16: 0}])
def test_other_tokens_are_refused_before_anything_changes(tokens: Tokens) -> None:
    model, clock = nn.Sequential(linear()), Clock(FAST)
    with pytest.raises(ValueError, match="accelerate_ needs (numbers of tokens|to know how often)"):
        _accelerate(Undo(), model, tokens, FORMATS, None, False, clock)
    assert kinds(model) == [nn.Linear] and clock.asked == []


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
    held = report.layers[0].bytes_after
    lines = str(report).splitlines()
    assert lines[0] == (
        f"2 of 3 layers run sparse, each faster than dense at tokens 1, 16; their weights take "
        f"{2 * held} B instead of 3.1 kB"
    )
    heads = "layer shape tokens runs eager us prepacked us sparse us vs eager vs prepacked"
    assert lines[2].split() == f"{heads} others us holds".split()
    cells = ["1", "block:4x8", "cpu", "100", "90.0", "30.0", "3.33x", "3.00x", "csr", "torch_csr"]
    assert lines[4].split() == ["0", "and", "1", "more", "16x24", *cells, "200", f"{held}", "B"]
    assert lines[5].split() == ["16", *cells[1:], "200"], "what a layer has once is said once"
    assert len(report.rows()) == 2 * len(report.distinct_rows()) == 4
    assert lines[6:] == [
        "0 and 1 more: block:4x8: faster than dense at every number of tokens",
        "2: dense: its weight has no zeros",
        report.coverage,
        report.gain,
    ]
    assert report.given_up == "", "both policies choose the same"


def test_the_last_sentence_says_what_the_model_gains() -> None:
    model = nn.Sequential(linear(), linear(), linear(out=32), linear(None))
    size = sum(one.nbytes for one in model.parameters())

    def times(tokens: int, name: str) -> float:
        return FAST[name] * 1000 * (10 if tokens == 16 and "block" not in name else 1)

    report, _ = run(model, times, {1: 3, 16: 1})
    after = size + sum(one.bytes_after - one.bytes_before for one in report.layers)
    assert report.gain == (
        "in all, summed over 3 measured layers, a call takes 90.0 ms instead of 270 at 1 token "
        "(3.00x), 90.0 ms instead of 2700 at 16 tokens (30.00x), 90.0 ms instead of 878 "
        f"on average (9.75x); the model holds {as_bytes(after)} instead of {as_bytes(size)}"
    )
    assert str(report).splitlines()[-1] == report.gain
    unchanged, _ = run(nn.Sequential(linear(None)), FAST)
    assert unchanged.gain == unchanged.given_up == ""


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
        layer: SparseLinear, tokens: int, searches: bool
    ) -> tuple[list[Candidate], list[str]]:
        return [Candidate(f"{layer.format} reference", lambda: layer, {}, (), layer.packed)], []

    monkeypatch.setattr(accelerate, "packed_candidates", candidates_of)
    model = nn.Sequential(linear("semi24"), linear("semi24", seed=1))
    weights = [layer.weight.detach().clone() for layer in model]
    times = FAST | {"semi24_int4 reference": 10.0}
    report = _accelerate(Undo(), model, (1,), ("semi24_int4",), None, False, Clock(times))
    assert [str(layer.format) for layer in model] == ["semi24_int4"] * 2
    errors = [layer.weight_error for layer in report.layers]
    for layer, weight, error in zip(model, weights, errors, strict=True):
        assert error == weight_error(weight, layer.packed) > 0.01
    assert f"rounded by up to {max(errors):.1%}" in report.headline
    assert report.rows()[1][3] == f"semi24_int4 reference, {errors[1]:.1%} off"
    assert report.to_dict()["layers"][0]["weight_error"] == errors[0]


# --- one format, an implementation for each number of tokens -------------------------------------


def halved(out: int = 16) -> nn.Linear:
    layer = nn.Linear(24, out, dtype=torch.float64)  # no prepacked dense
    layer.weight.data[:, 1::2] = 0
    return layer


TOY_BYTES, DENSE_BYTES = 16 * 12 * 8, 16 * 24 * 8
BUCKETS = {  # what is fastest: few at 1 token, dense at 16, many at 64
    1: {"dense": 10.0, "toy few": 4.0, "toy many": 6.0, "toy dense": 10.0},
    16: {"dense": 10.0, "toy many": 12.0, "toy dense": 10.1},
    64: {"dense": 20.0, "toy many": 10.0, "toy dense": 20.1},
}


def bucketed(
    change: Mapping[int, Mapping[str, float]] | None = None,
) -> Callable[[int, str], float]:
    return lambda tokens, name: (BUCKETS[tokens] | dict((change or {}).get(tokens, {})))[name]


def run_toy(
    model: nn.Module, times: Times, tokens: Sequence[int] = (1, 16, 64), **options: object
) -> tuple[AccelerateReport, Clock]:
    return run(model, times, tokens, **{"formats": (toy.toy,), **options})  # type: ignore[arg-type]


def test_each_number_of_tokens_has_its_own_implementation() -> None:
    model = nn.Sequential(halved())
    expected = {n: model(tokens_in(n, 24, dtype=torch.float64)) for n in (1, 5, 16, 17, 99)}
    report, _ = run_toy(model, bucketed())
    assert model[0].dispatch == "few<=1 dense<=16 many"
    (layer,) = report.layers
    assert layer.format == "toy" and layer.table == (("few", 1), ("dense", 16), ("many", None))
    assert [one.fastest_sparse for one in layer.measured] == ["toy few", "toy dense", "toy many"]
    assert [round(one.ratio, 2) for one in layer.measured] == [2.5, 0.99, 2.0]
    assert layer.reason == "faster than dense at tokens 1, 64, as fast at 16"
    assert [row[3] for row in report.rows()] == ["toy few", "toy dense", "toy many"]
    assert [row[-3] for row in report.rows()] == [
        "toy many 6.0, toy dense 10.0",
        "toy many 12.0",
        "toy dense 20.1",
    ]
    for tokens, wanted in expected.items():
        x = tokens_in(tokens, 24, dtype=torch.float64)
        assert torch.allclose(model(x), wanted, atol=1e-12)


def test_the_report_says_what_is_held_and_what_it_pays_for() -> None:
    report, _ = run_toy(nn.Sequential(halved()), bucketed())
    (layer,) = report.layers
    assert (layer.bytes_before, layer.stored) == (DENSE_BYTES, TOY_BYTES)
    assert layer.bytes_after == 3 * TOY_BYTES + DENSE_BYTES
    assert {row[-2] for row in report.rows()} == {as_bytes(layer.bytes_after)}
    assert layer.other == OtherPolicy("memory", ("dense",) * 3, (10.0, 10.0, 20.0), DENSE_BYTES)
    assert (
        "0: policy='memory' would run dense, take 10.0 us instead of 4.00 at 1 token, 10.0 us "
        "instead of 10.1 at 16 tokens, 20.0 us instead of 10.0 at 64 tokens, and hold 3.1 kB "
        "instead of 7.7 kB"
    ) in str(report)
    assert layer.cannot == ("few takes at most 8 tokens",)


def test_an_implementation_may_come_back_at_more_tokens() -> None:
    model = nn.Sequential(halved())
    run_toy(model, bucketed({1: {"toy many": 2.0}}))
    assert model[0].dispatch == "many<=1 dense<=16 many"
    assert model[0].nbytes == 2 * TOY_BYTES + DENSE_BYTES  # arranged once
    x = tokens_in(20, 24, dtype=torch.float64)
    assert torch.allclose(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))


def test_dense_against_itself_is_no_gain() -> None:
    times = {"dense": 10.0, "toy few": 11.0, "toy many": 11.0, "toy dense": 8.0}
    model = nn.Sequential(halved())
    report, _ = run_toy(model, times, (1,))
    assert kinds(model) == [nn.Linear]
    assert report.layers[0].reason == "at 1 token toy few is 0.91x of the best dense"


def test_above_what_was_measured_the_last_goes_on_as_far_as_it_can() -> None:
    """Beyond that runs what takes no more: nobody has asked for those numbers of tokens."""
    model = nn.Sequential(halved())
    report, _ = run_toy(model, bucketed(), (1,))
    assert model[0].dispatch == "few<=8 reference"
    assert (
        "0: above 8 tokens it runs its reference, which was not measured there: name larger "
        "numbers in tokens= if they occur"
    ) in str(report)
    report, _ = run_toy(nn.Sequential(halved()), bucketed())
    assert "above" not in str(report), "many goes on to any number"
    model, times = nn.Sequential(halved()), {"dense": 10.0, "lean few": 4.0, "lean many": 9.0}
    run_toy(model, times, (1,), formats=(toy.lean,))
    assert model[0].dispatch == "few<=8 many", "it was right at the largest number"


def test_policy_memory_takes_the_fastest_that_holds_the_weight_once() -> None:
    """`many` reads what is stored; `few` beside it arranges a copy."""

    def times(tokens: int, name: str) -> float:
        return {"dense": 10.0, "lean few": 4.0, "lean many": 9.0}[name]

    model = nn.Sequential(halved())
    report, _ = run_toy(model, times, (1, 16), formats=(toy.lean,), policy="memory")
    (layer,) = report.layers
    assert model[0].dispatch == "many" and layer.bytes_after == TOY_BYTES == layer.stored
    assert [one.fastest_sparse for one in layer.measured] == ["lean many"] * 2
    assert report.policy == "memory"
    assert layer.other == OtherPolicy(
        "fastest", ("lean few", "lean many"), (4.0, 9.0), 2 * TOY_BYTES
    )
    size = sum(one.nbytes for one in halved().parameters())
    assert report.given_up == (
        "with policy='fastest' a call would take 0.00400 ms instead of 0.00900 at 1 token, and the "
        f"model would hold {as_bytes(size - DENSE_BYTES + 2 * TOY_BYTES)} instead of "
        f"{as_bytes(size - DENSE_BYTES + TOY_BYTES)}"
    )
    fastest = nn.Sequential(halved())
    run_toy(fastest, times, (1, 16), formats=(toy.lean,))
    assert fastest[0].dispatch == "few<=1 many"


def test_by_default_a_weight_is_held_once() -> None:
    model, times = nn.Sequential(halved()), {"dense": 10.0, "lean few": 4.0, "lean many": 9.0}
    _accelerate(Undo(), model, (1,), (toy.lean,), None, False, Clock(times))
    assert model[0].dispatch == "many"


def test_policy_memory_leaves_dense_what_would_take_more() -> None:
    model = nn.Sequential(halved())
    report, _ = run_toy(model, bucketed(), policy="memory")
    assert kinds(model) == [nn.Linear]
    assert report.layers[0].reason == (
        "policy='memory' refuses toy few, toy dense, toy many (2.50x at 1 token, 0.99x at 16 "
        "tokens, 2.00x at 64 tokens): it would hold 7.7 kB, more than the weight once (dense holds "
        "3.1 kB): policy='fastest' takes it; at 16 tokens toy many is 0.83x of the best dense; few "
        "takes at most 8 tokens"
    )


def test_other_policies_are_refused(unchecked: None) -> None:
    with pytest.raises(ValueError, match="needs the policy 'memory' or 'fastest', got 'least'"):
        accelerate_(nn.Sequential(linear()), policy="least")  # type: ignore[arg-type]


def test_the_best_dense_quantised_is_shown_beside() -> None:
    model = nn.Sequential(halved(), nn.Linear(24, 8, dtype=torch.float64))
    times = bucketed({n: {"rounded fast": 5.0} for n in BUCKETS})
    report, _ = run_toy(model, times, formats=(toy.toy, toy.rounded))
    assert [layer.format for layer in report.layers] == ["rounded", "rounded"]
    assert report.dense_formats == ("rounded",) and not report.sparse
    assert report.headline.startswith("0 of 2 layers run sparse and 2 dense quantised, each faster")
    model = nn.Sequential(halved())
    times = bucketed({n: {"rounded fast": 9.9} for n in BUCKETS})
    report, _ = run_toy(model, times, formats=(toy.toy, toy.rounded), remeasure=True)
    assert report.layers[0].format == "toy"
    at = report.columns.index("dense quantised us")
    assert report.columns[at + 1] == "vs quantised"
    assert report.rows()[0][at : at + 2] == ("rounded fast 9.9", "2.48x")


# --- what is remembered --------------------------------------------------------------------------


def test_a_like_model_is_not_measured_again() -> None:
    first, _ = run_toy(nn.Sequential(halved()), bucketed())
    model = nn.Sequential(halved(), halved())
    report, clock = run_toy(model, FAST)  # whose times are never asked for
    assert clock.asked == []
    assert [layer.format for layer in report.layers] == ["toy", "toy"]
    assert model[1].dispatch == "few<=1 dense<=16 many"
    for one, other in zip(first.layers[0].measured, report.layers[0].measured, strict=True):
        assert one.microseconds == other.microseconds
        assert (one.remembered, other.remembered) == (False, True)
    assert {row[-1] for row in report.rows()} == {"earlier"}
    line = "1 threads; all remembered from earlier calls, remeasure=True measures afresh"
    assert str(report).splitlines()[1].endswith(line)


def test_what_is_new_is_measured() -> None:
    run_toy(nn.Sequential(halved()), bucketed(), (1, 16))
    report, clock = run_toy(nn.Sequential(halved()), bucketed())
    assert [count for count, _ in clock.asked] == [64]
    assert "2 of 3 rows remembered" in str(report)
    for model in (
        nn.Sequential(halved(32)),  # another shape
        nn.Sequential(halved().float()),
        nn.Sequential(nn.Linear(24, 16, bias=False, dtype=torch.float64)),
    ):
        model[0].weight.data[:, 1::2] = 0
        times = bucketed({1: {"dense prepacked": 10.0}})
        assert len(run_toy(model, times, (1,))[1].asked) == 1
    times = bucketed({1: {"rounded fast": 5.0}})
    _, clock = run_toy(nn.Sequential(halved()), times, (1,), formats=(toy.toy, toy.rounded))
    assert len(clock.asked) == 1  # other formats


@pytest.mark.parametrize(("spread", "again"), [(0.6, [1, 16]), (0.4, [])])
def test_times_of_a_busy_machine_serve_one_call(spread: float, again: list[int]) -> None:
    formats = [parse_format("block:4x8")]
    busy, quiet = Clock(FAST, spread), Clock(FAST)
    for clock in (busy, quiet):
        model = nn.Sequential(linear())
        report = _accelerate(Undo(), model, (1, 16), formats, None, False, clock, "fastest")
        assert [layer.format for layer in report.layers] == ["block:4x8"]
    assert [count for count, _ in quiet.asked] == again


def test_remeasure_measures_afresh() -> None:
    run_toy(nn.Sequential(halved()), bucketed(), (1,))
    slow = bucketed({1: {"toy few": 40.0, "toy many": 40.0}})
    model = nn.Sequential(halved())
    report, clock = run_toy(model, slow, (1,), remeasure=True)
    assert len(clock.asked) == 1 and kinds(model) == [nn.Linear]
    assert not report.layers[0].measured[0].remembered
    _, clock = run_toy(model, bucketed(), (1,))
    assert clock.asked == [] and kinds(model) == [nn.Linear]  # the latest is remembered


def test_another_device_version_or_set_of_implementations_measures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_toy(nn.Sequential(halved()), bucketed(), (1,))
    with monkeypatch.context() as patch:
        patch.setattr(remembered, "processor", lambda: "another chip")
        assert len(run_toy(nn.Sequential(halved()), bucketed(), (1,))[1].asked) == 1
    with monkeypatch.context() as patch:
        patch.setattr(remembered, "VERSION", "9.9")
        assert len(run_toy(nn.Sequential(halved()), bucketed(), (1,))[1].asked) == 1
    cannot = toy.Implementation("many", toy.half, lambda *_: "not here", toy.own("many_values"))
    other = replace(toy.toy, implementations=(toy.TOY[0], cannot, *toy.TOY[2:]))
    model = nn.Sequential(halved())
    assert len(run_toy(model, bucketed(), (1,), formats=(other,))[1].asked) == 1


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"place": {"layer": 3}}',
        '{"place": {"layer": {"1": "3"}}}',
        '{"place": {"layer": {"1": "{\\"microseconds\\": {\\"dense\\": -1.0}, '
        '\\"cannot\\": {}, \\"dropped\\": []}"}}}',
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "measured.json").write_text(text)
    model = nn.Sequential(halved())
    message = r"measured\.json (needs to be a table|cannot be read as JSON).*: delete it, and accel"
    with pytest.raises(ValueError, match=message):
        run_toy(model, bucketed())
    assert kinds(model) == [nn.Linear]
    assert (tmp_path / "measured.json").read_text() == text


def test_where_nothing_can_be_kept_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(remembered, "own_file", lambda name: tmp_path / "file" / name)
    warn_unkept.cache_clear()
    with pytest.warns(RuntimeWarning, match="measurements cannot be kept .*set SECATEUR_CACHE"):
        report, _ = run_toy(nn.Sequential(halved()), bucketed())
    assert report.layers[0].format == "toy"


def test_an_interruption_keeps_what_was_measured() -> None:
    stopping = Stopping(KeyboardInterrupt(), after=7)  # four candidates at 1 token, three at 16
    model = nn.Sequential(halved())

    def times(tokens: int, name: str) -> float:
        stopping(tokens, "dense")
        return BUCKETS[tokens][name]

    with pytest.raises(KeyboardInterrupt):
        run_toy(model, times)
    assert kinds(model) == [nn.Linear]
    report, clock = run_toy(model, bucketed())
    assert [count for count, _ in clock.asked] == [64]
    assert [one.remembered for one in report.layers[0].measured] == [True, True, False]


# --- what is dropped -----------------------------------------------------------------------------


class Failing(Clock):
    """A clock on which one candidate raises."""

    def __init__(self, variant: str, problem: BaseException) -> None:
        super().__init__(bucketed())
        self.variant, self.problem = variant, problem

    def __call__(self, variants: Mapping[str, Calls], device: torch.device) -> dict[str, Timing]:
        if self.variant in variants:
            raise VariantFailed(self.variant, self.problem)
        return super().__call__(variants, device)


@pytest.mark.parametrize(
    ("problem", "reason", "again"),
    [
        (RuntimeError("status 7\na trace"), "toy few failed: status 7", 0),
        (torch.OutOfMemoryError("3 GiB"), "toy few ran out of memory: 3 GiB", 1),
    ],
    ids=["library", "memory"],
)
def test_a_candidate_that_fails_is_dropped_alone(
    problem: BaseException, reason: str, again: int
) -> None:
    model = nn.Sequential(halved())
    report = _accelerate(
        Undo(), model, (1, 64), (toy.toy,), None, False, Failing("toy few", problem), "fastest"
    )
    assert model[0].dispatch == "many"
    assert report.layers[0].dropped == (reason,)
    assert f"0: dropped: {reason}" in str(report)
    _, clock = run_toy(nn.Sequential(halved()), bucketed(), (1, 64))
    assert len(clock.asked) == again  # memory may be free the next time


def test_without_dense_there_is_nothing_to_compare_with() -> None:
    model = nn.Sequential(halved())
    clock = Failing("dense", RuntimeError("status 7"))
    report = _accelerate(Undo(), model, (1,), (toy.toy,), None, False, clock)
    assert kinds(model) == [nn.Linear]
    assert report.layers[0].reason == "could not be measured: dense failed: status 7"


class Room:
    """Arranges `few` as often as there is room for it."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, packed: Packed) -> dict[str, Tensor]:
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("3 GiB")
        return {"few_values": packed["values"].clone()}

    def format(self) -> toy.Toy:
        few = toy.Implementation("few", toy.half, toy.few, Arrangement(("few_values",), self))
        return replace(toy.toy, implementations=(few, *toy.TOY[1:]))


def test_what_cannot_be_arranged_is_no_choice() -> None:
    run_toy(nn.Sequential(halved()), bucketed())
    model = nn.Sequential(halved())
    report, clock = run_toy(model, bucketed(), formats=(Room(0).format(),))
    assert model[0].dispatch == "many<=1 dense<=16 many" and clock.asked == []
    assert report.layers[0].dropped == (
        "toy few, toy dense, toy many ran out of memory: 3 GiB",
        "toy few, toy dense ran out of memory: 3 GiB",
    )


def test_a_layer_that_cannot_be_arranged_in_the_end_stays_dense() -> None:
    run_toy(nn.Sequential(halved()), bucketed())
    model = nn.Sequential(halved())
    report, _ = run_toy(model, bucketed(), formats=(Room(1).format(),))
    assert kinds(model) == [nn.Linear]
    (layer,) = report.layers
    assert layer.reason == "toy was faster, but packing it ran out of memory: 3 GiB"
    assert layer.bytes_after == layer.bytes_before and not layer.table and layer.other is None
    with pytest.raises(ValueError, match="needs every listed layer to gain, '0' does not .toy was"):
        run_toy(model, bucketed(), formats=(Room(1).format(),), layers=["0"], strict=True)


def test_what_cannot_be_measured_says_why() -> None:
    broken, empty = linear("semi24"), nn.Linear(24, 1)
    empty.weight = nn.Parameter(torch.empty(0, 24))
    broken.weight.data[0, 0] = torch.nan
    model = nn.Sequential(broken, empty, linear("csr").to(torch.float8_e4m3fn))
    report, clock = run(model, FAST)
    assert clock.asked == []
    assert [layer.reason for layer in report.layers] == [
        "its weight is not finite",
        "its weight is empty",
        "its weight is torch.float8_e4m3fn, which no format stores",
    ]


def test_an_adapter_is_measured_by_name_only() -> None:
    model = nn.ModuleDict({"base": linear("csr"), "lora_B": linear("csr")})
    report, _ = run(model, FAST)
    assert [(layer.layer, layer.reason) for layer in report.layers if not layer.measured] == [
        ("lora_B", "an adapter's weight (LoRA)")
    ]
    assert kinds(model)[1] is nn.Linear
    report, _ = run(model, FAST, layers=["lora_B"])
    assert report.layers[0].measured


def test_a_weight_without_data_is_refused() -> None:
    model = nn.Sequential(linear("csr"), linear("csr").to("meta"))
    with pytest.raises(ValueError, match=r"1.weight has no data \(meta device\): load the weights"):
        accelerate_(model)


def test_a_2_to_4_weight_is_measured_in_the_narrower_format_alone() -> None:
    """As many bytes, and the sparse tensor cores; a 4:8 weight has semi48 alone."""
    weights = {name: fitting_weight(name, 16, 64) for name in ("semi24", "semi48")}
    linears = {name: nn.Linear(64, 16, bias=False) for name in weights}
    for name, linear in linears.items():
        linear.weight.data.copy_(weights[name])
    formats = [parse_format(name) for name in DEFAULT_FORMATS]
    groups, skipped = _groups(nn.ModuleDict(linears), linears, formats, {})
    fitting = {name: [str(f) for f in like[0]] for like, names in groups.items() for name in names}
    assert not skipped and {"semi24", "semi48"} & {*fitting["semi24"]} == {"semi24"}
    assert {"semi24", "semi48"} & {*fitting["semi48"]} == {"semi48"}
