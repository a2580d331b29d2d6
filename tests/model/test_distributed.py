"""Two processes with batches of their own, against one process with all batches."""

import copy
import operator
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import secateur as sc
from secateur.criteria import snip, wanda_regional
from secateur.model.distributed import ALONE, Team, team
from secateur.patterns.grids import Grid
from secateur.reconstruct import Solution
from tests.models import Decoder, Experts

SIZE = 2
# The batches of each process: uneven in number, in order of rank.
FIRST = 3


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(20, (4, 12), generator=generator) for _ in range(5)]


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder().eval()


def held(weight: Tensor, gram: Tensor, held_gram: Tensor, pattern: Any) -> Solution:
    """The weight times the held-out share of each input, which makes that statistic visible."""
    mask = pattern.mask(weight.abs())
    share = held_gram.diagonal() / gram.diagonal()
    return Solution((weight * share).masked_fill(~mask, 0), mask)


def of_experts() -> tuple[nn.Module, list[Tensor]]:
    """The second process's rows reach an expert that the first process's do not."""
    torch.manual_seed(0)
    data = torch.randn(5, 40, 8)
    data[:, :, 0] = data[:, :, 0].abs() + 0.01
    reached = data[:, :, 0].mul(10).long() % 4
    data[:FIRST, :, 0] = torch.where(reached == 2, 0.05, data[:, :, 0])[:FIRST]
    return Experts(), list(data)


def of_decoder(verb: Any, method: Any, pattern: str = "2:4", **options: Any) -> Any:
    def run(part: slice) -> Any:
        model = decoder()
        return model, verb(model, pattern, method, batches()[part], **options)

    return run


def run_experts(part: slice) -> Any:
    model, data = of_experts()
    return model, sc.reconstruct_(model, "2:4", sc.sparsegpt, data[part])


CASES: dict[str, Callable[[slice], tuple[nn.Module, Any]]] = {
    "wanda": of_decoder(sc.prune_, sc.wanda),
    "magnitude": of_decoder(sc.prune_, sc.magnitude),
    "snip": of_decoder(sc.prune_, snip),
    "regional": of_decoder(sc.prune_, wanda_regional, "unstructured:0.5"),
    "sparsegpt": of_decoder(sc.reconstruct_, sc.sparsegpt, offload=True),
    "unstructured": of_decoder(sc.reconstruct_, sc.sparsegpt, "unstructured:0.6@layer"),
    "refit": of_decoder(sc.reconstruct_, sc.refit(sc.ria, damping=1.0)),
    "held": of_decoder(sc.reconstruct_, held),
    "experts": run_experts,
}


def fails_in_second(weight: Tensor, gram: Tensor, pattern: Any) -> Solution:
    if dist.get_rank() == 1:
        raise ArithmeticError("no luck")
    return sc.sparsegpt(weight, gram, pattern)


def refused(rank: int) -> dict[str, tuple[str, bool]]:
    """The error of each call in this process, and whether the model was left unchanged."""
    mine = [slice(0, FIRST), slice(FIRST, None)][rank]
    other_plan = sc.plan(decoder(), ["2:4", "1:4"][rank])
    dented = decoder()
    if rank:
        dented.blocks[0].up_proj.weight.data[0, 0] = torch.nan
    other = decoder()
    other.blocks[0].up_proj.weight.data[0, 0] += rank
    data = batches()[mine]
    broken = [*data[:-1], data[-1] + 20 * rank]
    broken_first = [data[0] + 20 * (1 - rank), *data[1:]]
    calls: dict[str, tuple[nn.Module, Any, Any, list[Tensor]]] = {
        "no batches": (decoder(), "2:4", sc.sparsegpt, [data, []][rank]),
        "other plan": (decoder(), other_plan, sc.sparsegpt, data),
        "other weights": (other, "2:4", sc.sparsegpt, data),
        "not finite": (dented, "2:4", sc.sparsegpt, data),
        "bad batch": (decoder(), "2:4", sc.sparsegpt, broken),
        "failing": (decoder(), "2:4", fails_in_second, data),
        "bad first batch": (decoder(), "2:4", sc.best, broken_first),
        "thorough": (decoder(), "2:4", sc.blockwise(sc.sparsegpt, distil=1), data),
    }
    found = {}
    for name, (model, plan, method, given) in calls.items():
        before = copy.deepcopy(model.state_dict())
        try:
            sc.reconstruct_(model, plan, method, given)
            message = ""
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        same = all(
            torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
            for a, b in zip(before.values(), model.state_dict().values(), strict=True)
        )
        found[name] = (message, same)
    return found


def stopped_and_resumed(folder: Path, part: slice) -> dict[str, Tensor]:
    """Stopped by an error in the second block, then called again."""
    calls = []

    def stopping(weight: Tensor, gram: Tensor, pattern: Any) -> Solution:
        calls.append(weight)
        if len(calls) == 5:
            raise KeyError("stop")
        return sc.sparsegpt(weight, gram, pattern)

    def counted(weight: Tensor, gram: Tensor, pattern: Any) -> Solution:
        calls.append(weight)
        return sc.sparsegpt(weight, gram, pattern)

    counted.__name__ = stopping.__name__ = "counted"
    model = decoder()
    try:
        sc.reconstruct_(model, "2:4", stopping, batches()[part], checkpoint=folder)
    except (KeyError, ValueError):
        pass
    finished = len(list(folder.glob("*.safetensors")))
    calls.clear()
    sc.reconstruct_(model, "2:4", counted, batches()[part], checkpoint=folder)
    return {**model.state_dict(), "finished": torch.tensor(finished)}


def half_blocks(data: list[Tensor], grid: Grid | None = None) -> tuple[dict[str, Tensor], Any]:
    model = decoder()
    report = sc.reconstruct_(model, "2:4", sc.blockwise(sc.sparsegpt, epochs=2, grid=grid), data)
    return model.state_dict(), report


def eight() -> list[Tensor]:
    """Eight batches: then the second process holds out the same ones as the first."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(20, (4, 12), generator=generator) for _ in range(8)]


def copied(rank: int) -> Tensor:
    """The second process's tensor, with a memory order different from its own."""
    tensor = (torch.arange(6.0) + 10 * rank).view(2, 3).T
    team().broadcast_(1, tensor)
    return tensor


def work(rank: int, folder: Path) -> None:
    """Run the checks in one of the two processes; write its findings to a file."""
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=SIZE)
    part = [slice(0, FIRST), slice(FIRST, None)][rank]
    found = {name: run(part) for name, run in CASES.items()}
    results = {
        "cases": {name: (model.state_dict(), report) for name, (model, report) in found.items()},
        "refused": refused(rank),
        "resumed": stopped_and_resumed(folder / "checkpoint", part),
        "halves": half_blocks(batches()[part]),
        "halves of the same": half_blocks(eight()),
        "halves on a grid": half_blocks(batches()[part], sc.Int4(8)),
        "copied": copied(rank),
        "team": team(),
    }
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The findings of the processes, by rank; they run without runtime type checks."""
    folder = tmp_path_factory.mktemp("team")
    code = "import sys, pathlib; from tests.model.test_distributed import work; "
    code += "work(int(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    root = Path(__file__).parents[2]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(folder)],
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(SIZE)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * SIZE, errors
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(SIZE)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_end_with_the_model_of_one(name: str, found: list[dict[str, Any]]) -> None:
    """Masks agree, weights up to the order of float32 sums; the processes agree bit for bit."""
    model, report = CASES[name](slice(None))
    (first, of_first), (second, of_second) = (results["cases"][name] for results in found)
    for key, expected in model.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        assert torch.equal(first[key] == 0, expected == 0), key
        torch.testing.assert_close(first[key], expected, rtol=1e-4, atol=1e-5)
    assert of_first.layers == of_second.layers
    for one, two in zip(report.layers, of_first.layers, strict=True):
        assert (one.layer, one.pattern, one.tokens) == (two.layer, two.pattern, two.tokens)
        assert (one.error, two.error) == (None, None) or one.error == pytest.approx(
            two.error, rel=1e-3
        )


def errors(report: Any) -> list[float]:
    """Held-out errors before and after, for each half-block in order."""
    notes = "; ".join(layer.note for layer in report.layers)
    found = re.findall(r"held-out error (\S+) before training, (\S+) after", notes)
    return [float(error) for pair in found for error in pair]


def test_half_blocks_follow_the_mean_gradient_of_the_processes(found: list[dict[str, Any]]) -> None:
    """With the same batches in both processes, the mean is each one's own: the result is one's."""
    expected, report = half_blocks(eight())
    for results in found:
        model, same_report = results["halves of the same"]
        for key, value in expected.items():
            assert torch.equal(value == 0, model[key] == 0), key
            torch.testing.assert_close(model[key], value, rtol=1e-3, atol=1e-4)
        assert errors(same_report) == pytest.approx(errors(report), rel=1e-2)


def test_half_blocks_of_uneven_shares_end_alike_and_lose_less(found: list[dict[str, Any]]) -> None:
    (first, report), (second, other) = (results["halves"] for results in found)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert report.layers == other.layers
    befores, afters = errors(report)[::2], errors(report)[1::2]
    assert len(befores) == 6 and all(map(operator.le, afters, befores))
    assert min(map(operator.truediv, afters, befores)) < 0.95


def test_half_blocks_on_a_grid_end_alike_and_on_it(found: list[dict[str, Any]]) -> None:
    """Gram matrices, and gradients of scales, are those of the batches of both."""
    (first, report), (second, other) = (results["halves on a grid"] for results in found)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert report.layers == other.layers
    for row in report.layers:
        weight = first[f"{row.layer}.weight"]
        scales = sc.Int4(8).scales(weight)
        assert torch.equal(sc.Int4(8).dequantised(sc.Int4(8).codes(weight, scales), scales), weight)


def test_each_layer_is_solved_by_one_process(found: list[dict[str, Any]]) -> None:
    """The layers of a stage (queries, keys, values) are shared out: the fifth call is later."""
    expected = decoder()
    sc.reconstruct_(expected, "2:4", sc.sparsegpt, batches())
    for results in found:
        resumed = results["resumed"]
        # The first process: q, v, o, up, down of the first block, where it is stopped.
        assert int(resumed.pop("finished")) == 3
        for key, value in expected.state_dict().items():
            assert torch.equal(value == 0, resumed[key] == 0), key
            torch.testing.assert_close(resumed[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "messages"),
    [
        (
            "no batches",
            (
                "ValueError: process 1 of 2 raised ValueError: calibration needs at least one",
                "ValueError: calibration needs at least one batch, got none",
            ),
        ),
        ("other plan", ("ValueError: processes that calibrate together need the same plan",) * 2),
        (
            "other weights",
            ("ValueError: processes that calibrate together need the same weights",) * 2,
        ),
        (
            "not finite",
            (
                "ValueError: process 1 of 2 raised ValueError: blocks.0.up_proj.weight holds 1 NaN",
                "ValueError: blocks.0.up_proj.weight holds 1 NaN",
            ),
        ),
        (
            "bad batch",
            ("ValueError: process 1 of 2 raised IndexError", "IndexError: index out of range"),
        ),
        (
            "failing",
            (
                "ValueError: process 1 of 2 raised ArithmeticError: no luck",
                "ArithmeticError: no luck",
            ),
        ),
        (
            "bad first batch",
            ("ValueError: Decoder cannot run", "ValueError: process 0 of 2 raised ValueError: Dec"),
        ),
        (
            "thorough",
            ("ValueError: blockwise(sparsegpt, distil=1) trains the whole model in one process",)
            * 2,
        ),
    ],
)
def test_an_error_in_one_process_is_one_in_all_and_changes_nothing(
    call: str, messages: tuple[str, str], found: list[dict[str, Any]]
) -> None:
    for results, expected in zip(found, messages, strict=True):
        message, same = results["refused"][call]
        assert message.startswith(expected)
        assert same


def test_a_team_is_what_torch_distributed_says(found: list[dict[str, Any]]) -> None:
    assert team() is ALONE
    assert [results["team"] for results in found] == [Team(2, 0), Team(2, 1)]
    for results in found:
        assert results["copied"].tolist() == [[10, 13], [11, 14], [12, 15]]


def test_alone_nothing_is_exchanged() -> None:
    tensor = torch.tensor([1.0, 2.0])
    ALONE.all_reduce_([tensor])
    ALONE.broadcast_(0, tensor)
    assert tensor.tolist() == [1.0, 2.0]
    assert ALONE.all_gather("mine") == ["mine"]
    with pytest.raises(ArithmeticError, match="as it was"), ALONE.raising_together():
        raise ArithmeticError("as it was")
