"""Laws of the choice: the shortest day of all that obey, on small random tables of times."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.accelerate.choices import (
    LEAST_GAIN,
    NO_LOSS,
    ONE_FORM,
    Policy,
    is_dense,
    runs_at,
)
from secateur.accelerate.decision import POLICIES, Decision, decide
from secateur.accelerate.measurements import Measurement
from secateur.accelerate.tokens import Day
from secateur.formats.contract import Arrangement, Format, Implementation
from secateur.formats.linear import SparseLinear
from secateur.formats.reference import REFERENCE, anywhere
from tests import toy

WEIGHT = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
WEIGHT[:, 1::2] = 0
UNITS = Arrangement(
    ("units",),
    lambda packed: {"units": packed["values"].clone()},
    lambda packed: {"values": packed["units"].clone()},
)
# Two implementations read one form, from which what is stored comes back.
SHARED = toy.Toy(
    "shared",
    (
        Implementation("few", toy.half, toy.few, UNITS),
        Implementation("many", toy.half, anywhere, UNITS),
        Implementation("copy", toy.half, anywhere, toy.own("copied")),
        REFERENCE,
    ),
)
NAMES = (
    *("toy few", "toy many", "toy dense", "lean few", "lean many"),
    *("shared few", "shared many", "shared copy"),
)
DENSE_US = 100.0
TIMES = st.sampled_from([30.0, 60.0, 90.0, 95.0, 97.0, 100.0, 103.0, 104.0, 150.0])
OFTEN = st.sampled_from([1e-9, 1.0, 3.0, 1000.0])


@cache
def layers() -> dict[Format, SparseLinear]:
    """Both formats' layers, which a decision leaves as they were."""
    return {
        format: SparseLinear(format.pack(WEIGHT), table=(("reference", None),))
        for format in (toy.toy, toy.lean, SHARED)
    }


@dataclass(frozen=True)
class Case:
    """Numbers of tokens, how often each occurs, and the microseconds at each.

    Plain data: what is checked at run time draws random numbers, which no strategy may.
    """

    tokens: tuple[int, ...]
    often: tuple[float, ...]
    times: tuple[Mapping[str, float], ...]

    def decided(self, policy: Policy) -> Decision:
        found = [Measurement(times, {}, ()) for times in self.times]
        day = Day(self.tokens, self.often)
        return decide(layers(), day, found, WEIGHT.nbytes, policy)

    def only(self, kept: Collection[int]) -> "Case":
        rows = [i for i, count in enumerate(self.tokens) if count in kept]
        tokens = tuple(self.tokens[i] for i in rows)
        often = tuple(self.often[i] for i in rows if self.often)
        return Case(tokens, often, tuple(self.times[i] for i in rows))

    def total(self, names: Sequence[str]) -> Fraction:
        """The day's time; dense takes as long everywhere, so equal shares are equal frequencies.

        What runs as dense does is no faster than dense.
        """
        often = self.often or (1.0,) * len(self.tokens)
        us = [
            max(at[name], DENSE_US) if is_dense(name) else at[name]
            for at, name in zip(self.times, names, strict=True)
        ]
        return sum((Fraction(n) * Fraction(t) for n, t in zip(often, us, strict=True)), Fraction())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tokens = sorted(draw(st.sets(st.sampled_from([1, 4, 16, 2048]), min_size=1, max_size=3)))
    often = tuple(draw(OFTEN) for _ in tokens) if draw(st.booleans()) else ()
    times = []
    for count in tokens:
        able = [name for name in NAMES if count <= toy.MOST_OF_FEW or "few" not in name]
        ran = [name for name in able if draw(st.booleans())]
        times.append({"dense": DENSE_US, **{name: draw(TIMES) for name in ran}})
    return Case(tuple(tokens), often, tuple(times))


def bytes_of(layer: SparseLinear, names: Sequence[str]) -> int:
    """What the implementations take together; at more tokens the reference takes nothing."""
    known = {f"{layer.format} {one.name}": one for one in layer.format.implementations}
    chosen = [known[name] for name in set(names)]
    held = {} if any(one.restores for one in chosen) else dict(layer.packed.tensors)
    for one in chosen:
        held |= one.arranged(layer.packed).tensors
    return sum(tensor.nbytes for tensor in held.values())


def every_day(case: Case, policy: Policy) -> Iterator[Fraction]:
    """The day's time in every way to run the layer that obeys: dense, or one format."""
    yield case.total(["dense"] * len(case.tokens))
    for format, layer in layers().items():
        own = [[name for name in at if name.startswith(f"{format} ")] for at in case.times]
        for names in product(*own):
            us = [at[name] for at, name in zip(case.times, names, strict=True)]
            ratios = [DENSE_US / time for time in us]
            sparse = [r for r, name in zip(ratios, names, strict=True) if not is_dense(name)]
            once = bytes_of(layer, names) <= ONE_FORM * layer.packed.nbytes
            fast = max(sparse, default=0) >= LEAST_GAIN and min(ratios) >= NO_LOSS
            if fast and (once or policy == "fastest"):
                yield case.total(names)


def chosen(case: Case, decision: Decision) -> tuple[str, ...]:
    if decision.format is None:
        return ("dense",) * len(case.tokens)
    return tuple(str(at.fastest_sparse) for at in decision.measured)


@given(cases(), st.sampled_from(POLICIES))
def test_the_day_is_the_shortest_of_all_that_obey(case: Case, policy: Policy) -> None:
    assert case.total(chosen(case, case.decided(policy))) == min(every_day(case, policy))


@given(cases(), st.sampled_from(POLICIES))
def test_nothing_chosen_is_slower_anywhere_however_rare(case: Case, policy: Policy) -> None:
    decision = case.decided(policy)
    if decision.format is not None:
        assert all(at.ratio >= NO_LOSS for at in decision.measured)
        assert any(at.ratio >= LEAST_GAIN for at in decision.measured)


@given(cases())
def test_under_memory_a_layer_holds_its_weight_once(case: Case) -> None:
    decision = case.decided("memory")
    if decision.format is not None:
        layer = deepcopy(layers()[decision.format])
        layer.use(decision.table)
        assert layer.nbytes <= ONE_FORM * layer.packed.nbytes == ONE_FORM * decision.stored


@given(cases(), st.sampled_from(POLICIES), st.sampled_from([2.0**-20, 8.0, 2.0**30]))
def test_how_often_is_a_proportion(case: Case, policy: Policy, factor: float) -> None:
    scaled = replace(case, often=tuple(factor * often for often in case.often))
    one, other = case.decided(policy), scaled.decided(policy)
    assert (one.format, one.table, one.reason) == (other.format, other.table, other.reason)


@given(cases(), st.sampled_from(POLICIES))
def test_each_number_of_tokens_runs_what_was_reported(case: Case, policy: Policy) -> None:
    decision = case.decided(policy)
    if decision.format is not None:
        for at in decision.measured:
            name = runs_at(decision.table, at.tokens)
            assert at.fastest_sparse == f"{decision.format} {name}"


@given(cases())
def test_each_policy_reports_what_the_other_would_choose(case: Case) -> None:
    small, fast = case.decided("memory"), case.decided("fastest")
    same = (small.format, small.table) == (fast.format, fast.table)
    assert (small.other is None) == (fast.other is None) == same
    if small.other is None or fast.other is None:
        return
    assert (small.other.policy, fast.other.policy) == ("fastest", "memory")
    layer = deepcopy(layers()[fast.format or toy.toy])
    layer.use(fast.table)
    assert small.other.nbytes == layer.nbytes
    assert small.other.runs == chosen(case, fast) and fast.other.runs == chosen(case, small)
    for decision in (small.other, fast.other):
        us = tuple(at[name] for at, name in zip(case.times, decision.runs, strict=True))
        assert decision.microseconds == us


@given(cases(), st.sampled_from(POLICIES))
def test_what_a_refusal_advises_works(case: Case, policy: Policy) -> None:
    decision = case.decided(policy)
    advised = re.search(r"leave ([\d, ]+) out of tokens= and it runs (\w+),", decision.reason)
    if advised is not None:
        left = {int(number) for number in advised[1].split(", ")}
        followed = case.only([n for n in case.tokens if n not in left]).decided(policy)
        assert str(followed.format) == advised[2]
    if "policy='fastest' takes it" in decision.reason:
        assert case.decided("fastest").format is not None
    if decision.format is None and not case.often and "calls together" not in decision.reason:
        alone = [case.only([count]).decided(policy).format for count in case.tokens]
        assert advised or not any(alone), "a gain at some numbers of tokens is advised"


def test_a_rare_number_constrains_and_the_frequent_ones_decide() -> None:
    times: Mapping[int, Mapping[str, float]] = {
        1: {"dense": 100.0, "toy many": 50.0, "lean many": 60.0},
        2048: {"dense": 1000.0, "toy many": 1031.0, "lean many": 1000.0},
    }
    rare = Case((1, 2048), (1e9, 1e-9), (times[1], times[2048]))
    assert str(rare.decided("fastest").format) == "lean"  # 0.9699 is too slow
    within = replace(rare, times=(times[1], {**times[2048], "toy many": 1030.0}))
    assert str(within.decided("fastest").format) == "toy"
    assert str(replace(within, often=(1.0, 1.0)).decided("fastest").format) == "lean"


def test_a_gain_that_all_calls_together_do_not_have_is_none() -> None:
    times = {"dense": 10.0, "lean many": 5.0}, {"dense": 400.0, "lean many": 410.0}
    case = Case((1, 2048), (1.0, 1.0), times)
    decision = case.decided("memory")
    assert decision.format is None
    assert "all calls together would take 1.012x as long as dense with lean many" in decision.reason
    more = replace(case, often=(3.0, 1.0)).decided("memory")
    assert str(more.format) == "lean"
    assert more.reason.endswith("; a call takes 106.2 us instead of 107.5 on average")


def test_a_refusal_names_the_number_of_tokens_its_limit_and_what_to_do() -> None:
    """`few` is fast and takes 8 tokens at most; `many` is slow at 2048."""
    times = {"dense": 10.0, "lean few": 4.0}, {"dense": 400.0, "lean many": 500.0}
    reason = Case((1, 2048), (), times).decided("fastest").reason
    assert reason == (
        "at 2048 tokens lean many is 0.80x of the best dense; leave 2048 out of tokens= and it "
        "runs lean, 2.50x at 1 token; at 2048 tokens it then runs lean reference, not measured"
    )
