"""Chains of launches on cold weights: what is wrong has no time, and what fails has a reason."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from bench.lib import cold
from bench.lib.shapes import SHAPES
from secateur.formats.kernels import timing


@pytest.mark.parametrize(
    ("nbytes", "memory", "copies", "launches"),
    [
        (6_553_600, 10**12, 199, 199),  # o in int4: many small copies
        (45_875_200, 10**12, 29, 232),
        (234_881_024, 10**12, 6, 54),  # dense gate_up: 3 ms
        (939_524_096, 10**12, 2, 14),
        (939_524_096, 10**9, 1, 14),  # there is room for no other
        (939_524_096, 0, 1, 14),
        (25_600, 10**12, 260, 260),
    ],
)
def test_copies_are_cold_and_launches_whole_rotations(
    nbytes: int, memory: int, copies: int, launches: int
) -> None:
    assert cold.copies_for(nbytes, memory) == copies
    assert cold.launches_for(nbytes, 1, copies) == launches and launches % copies == 0


def test_chains_of_many_tokens_are_one_rotation() -> None:
    gate_up = 2 * 28672 * 4096
    assert cold.launches_for(gate_up, 16 * gate_up, 6) == 54
    assert cold.launches_for(gate_up, 1024 * gate_up, 6) == 12
    assert cold.launches_for(gate_up, 16384 * gate_up, 6) == 6


def test_chains_take_turns_and_rotate_over_their_copies() -> None:
    called: list[str] = []

    def run_of(name: str) -> cold.Run:
        return lambda x: (called.append(name), x)[1]

    x = torch.ones(1)
    chains = {
        "a": cold.chain([run_of("a0"), run_of("a1")], x, 4),
        "b": cold.chain([run_of("b")], x, 1),
    }
    called.clear()
    timings = cold.in_turns(chains, torch.device("cpu"), rounds=3)
    warm_up = 2
    words = " ".join(called).replace("a0 a1 a0 a1", "a").split()
    rounds = [words[at : at + 2] for at in range(0, len(words), 2)]
    assert len(rounds) == warm_up + 3 and all(sorted(turns) == ["a", "b"] for turns in rounds)
    assert {name: timing.rounds for name, timing in timings.items()} == {"a": 3, "b": 3}
    assert cold.in_turns({}, torch.device("cpu")) == {}


@pytest.mark.parametrize(("group", "places"), [(4, 6), (8, 70)])
def test_random_weights_keep_half_of_each_group(group: int, places: int) -> None:
    dense, sparse = cold.random_weights((256, 64), torch.device("cpu"), group)
    kept = sparse != 0
    assert (dense != 0).all() and torch.equal(sparse, dense * kept)
    assert not sparse[~kept].signbit().any()  # a compressor may take -0.0 for a number
    assert (kept.unflatten(1, (-1, group)).sum(2) == group // 2).all()
    assert len(kept.view(-1, group).unique(dim=0)) == places
    assert dense.dtype == torch.bfloat16


def test_wrong_results_are_rows_without_a_time() -> None:
    x = torch.ones(16, 2)
    calls: list[int] = []

    def later_wrong(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.clone() if len(calls) == 1 else x * torch.nan

    def candidate(name: str, run: cold.Run) -> cold.Candidate:
        return cold.Candidate(name, 10**9, lambda: run, x, Tensor.double, "right", rows=8, most=16)

    everyone = {"right": torch.clone, "wrong": torch.zeros_like, "later": later_wrong}
    ready = [(candidate(name, run), [run]) for name, run in everyone.items()]
    layer = cold.Layer("a layer", (2, 2), ready, {"absent": "not here"})
    rows = {
        str(row["candidate"]): row for row in cold.case(layer, 3, torch.device("cpu"), rounds=2)
    }
    assert rows["right"]["us"] and rows["right"]["note"] == "8 rows" and set(calls) == {8}
    notes = {name: row["note"] for name, row in rows.items() if not row["us"]}
    assert notes == {
        "wrong": "wrong result: relative error 1.0e+00",
        "later": "wrong result in a chain of launches: relative error nan",
        "absent": "not here",
    }
    assert len({tuple(row) for row in rows.values()}) == 1  # the same columns
    too_many = list(cold.case(layer, 17, torch.device("cpu"), rounds=2))
    assert [row["note"] for row in too_many[1:]] == ["takes at most 16 tokens"] * 3


@pytest.mark.parametrize(
    ("code", "values"),
    [
        ("print('1980, 45, 512.3')", ["1980", "45", "512.3"]),
        ("print('no device')", ["", "", ""]),
        ("import time; time.sleep(60)", ["", "", ""]),
    ],
)
def test_clocks_are_read_if_they_come_soon(
    code: str, values: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold, "PATIENCE", 0.1 if "sleep" in code else 60)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert list(cold.clocks_answered(process).values()) == values
    assert list(cold.clocks_answered(None)) == ["sm_mhz", "celsius", "watts"]


def test_what_a_chain_reads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph knows only addresses: it keeps nothing that its launches read."""
    x = torch.ones(2, 4)
    made = list["weakref.ref[nn.Linear]"]()

    def tune(runs: Sequence[cold.Run], x: Tensor) -> cold.Tuned:
        tuned = [nn.Linear(4, 4, bias=False).requires_grad_(False) for _ in runs]
        made.extend(map(weakref.ref, tuned))
        tuned[0].weight.copy_(torch.eye(4))
        return tuned, ""

    def captured(*arguments: object) -> timing.Chain:
        return timing.Chain(lambda: None, lambda: None, 1, captured=True)

    monkeypatch.setattr(cold, "chain", captured)
    candidate = cold.Candidate("a", 64, lambda: torch.clone, x, Tensor.double, "a", tune)
    prepared = cold.prepared(candidate, [torch.clone, torch.clone], 2)
    gc.collect()
    assert len(made) == 2 and [one() for one in made] == list(prepared.runs)


def test_failures_are_rows_with_a_reason() -> None:
    x = torch.ones(200, 2)

    def full() -> cold.Run:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    calls = list[int]()

    def fails_late(x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) > 3:
            raise RuntimeError("the library has given up\nat a place")
        return x.clone()

    def one_nan(x: Tensor) -> Tensor:
        result = x.clone()
        result[1, 0] = torch.nan  # not among the tokens that are compared
        return result

    def maker(name: str, make: object) -> list[cold.Candidate]:
        return [cold.Candidate(name, 10**9, make, x, Tensor.double, "right")]  # type: ignore[arg-type]

    made = {
        "right": lambda: torch.clone,
        "full": full,
        "late": lambda: fails_late,
        "nan": lambda: one_nan,
    }
    makers = {name: lambda name=name, make=make: maker(name, make) for name, make in made.items()}
    layer = cold.layer_from("a layer", (2, 2), makers, 10**10)
    rows = {row["candidate"]: row for row in cold.case(layer, 200, torch.device("cpu"), rounds=5)}
    assert rows["right"]["us"] and len({tuple(row) for row in rows.values()}) == 1
    assert {name: row["note"] for name, row in rows.items() if not row["us"]} == {
        "full": "CUDA out of memory",
        "late": "the library has given up",
        "nan": "wrong result: relative error nan",
    }
    tokens = cold.wanted_of(layer.ready[0][0], x).tokens
    assert len(tokens) == cold.CHECKED and {0, 199} < set(tokens.tolist()) and 1 not in tokens


def test_shapes_and_tokens_of_prefill() -> None:
    parser = cold.parser_of("prefill", "", ["sam-vit-h"], [128])
    assert cold.parsed(parser, []).layers == ["SAM-ViT-h lin1", "SAM-ViT-h lin2"]
    assert SHAPES["SAM-ViT-h lin1"] == (5120, 1280) and SHAPES["SAM-ViT-h lin2"] == (1280, 5120)
