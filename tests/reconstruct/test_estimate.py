"""What a preset says it will take, held to counts by hand and to a run."""

import copy
import importlib
import re
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import secateur as sc
from secateur.criteria import taylor
from secateur.model.layers import select
from secateur.model.plan import match
from secateur.reconstruct import Estimate, estimate
from secateur.reconstruct.estimate import peak_bytes
from secateur.reconstruct.rehearsal import Solved, Stage
from tests.inside import KINDS, problem
from tests.models import ConvNet, Decoder

WIDTH, BATCHES, ROWS, LENGTH = 64, 4, 4, 16
TOKENS = ROWS * LENGTH


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(width=WIDTH, blocks=2)


def tokens(count: int = BATCHES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(20, (ROWS, LENGTH), generator=generator) for _ in range(count)]


def stages(count: int = 1) -> list[Stage]:
    """The stages of one block, by hand."""
    return [
        Stage("b", ("q", "k", "v"), ((WIDTH, WIDTH),) * 3, count * TOKENS),
        Stage("b", ("o",), ((WIDTH, WIDTH),), count * TOKENS),
        Stage("b", ("up",), ((2 * WIDTH, WIDTH),), count * TOKENS),
        Stage("b", ("down",), ((WIDTH, 2 * WIDTH),), count * TOKENS),
    ]


def told(model: nn.Module, batches: list[Tensor], **options: Any) -> Estimate:
    """The estimate for all layers at 2:4."""
    plan = sc.plan(model, "2:4")
    return estimate(model, match(model, plan), plan.layers, batches, **options)


# --- bytes ---------------------------------------------------------------------------------------


def test_bytes_are_counted_by_hand() -> None:
    """The block has 8 WIDTH^2 weights; its layers keep 7 + 3 + 5 + 4 times WIDTH a token."""
    training = 16 * (2 * WIDTH) ** 2 + 28 * 8 * WIDTH**2 + 4 * 19 * WIDTH * TOKENS
    assert peak_bytes(stages(), 1000, 4) == 4 * 1000 + training
    solving = 4 * (9 * (2 * WIDTH) ** 2 + 14 * 2 * WIDTH * WIDTH)
    assert peak_bytes(stages()[-1:], 0, 2) == solving
    half = 16 * (2 * WIDTH) ** 2 + 28 * 8 * WIDTH**2 + 2 * 19 * WIDTH * TOKENS
    assert peak_bytes(stages(), 0, 2) == max(half, solving)


def test_a_models_bytes_are_those_of_its_layers_and_hidden_states() -> None:
    model = decoder()
    hidden = BATCHES * TOKENS * WIDTH * 4
    expected = peak_bytes(stages(), hidden, 4)
    assert told(model, tokens()).bytes == expected
    assert told(model, tokens(), offload=True).bytes == expected - 4 * hidden
    rest = [tokens(1)[0][:2], tokens(1)[0][:1]]  # smaller batches count less
    smaller = told(model, [*tokens(1), *rest]).bytes
    assert smaller == peak_bytes(stages(), hidden // BATCHES * 7 // 4, 4)


def test_convolutions_count_every_place_of_an_image() -> None:
    torch.manual_seed(0)
    model = ConvNet()
    layers = {n: m for n, m in select(model).layers.items() if n.startswith("stage1")}
    image = torch.randn(2, 4, 10, 10)
    of_block = [Stage(one.rpartition(".")[0], (one,), ((8, 72),), 200) for one in layers]
    patterns = {name: sc.NM(2, 4) for name in layers}
    found = estimate(model, layers, patterns, [image, image]).bytes
    assert found == peak_bytes(of_block, 2 * image.numel() * 2 * 4, 4)


class Peak(TorchDispatchMode):
    """The most bytes that tensors created inside it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


@pytest.mark.parametrize(
    ("width", "rows", "count"),
    [(128, 2, 2), (64, 4, 16), (64, 128, 2)],
    ids=["solving", "hidden states", "training"],
)
def test_a_run_holds_about_as_many_bytes_as_it_says(
    width: int, rows: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name, value in (
        ("alps", "ITERATIONS", 6),  # each takes the same room
        ("refit", "TOLERANCE", 0.1),
    ):
        monkeypatch.setattr(importlib.import_module(f"secateur.reconstruct.{module}"), name, value)
    torch.manual_seed(0)
    model = Decoder(width=width, blocks=2)
    batches = list(torch.randint(20, (count, rows, LENGTH)))
    plan = sc.plan(model, "2:4", ignore=["blocks.0.*"])
    told = estimate(model, match(model, plan), plan.layers, batches).bytes
    with Peak() as peak:
        sc.reconstruct_(model, plan, sc.blockwise(sc.alps, epochs=1), batches)
    assert peak.most < told < 1.6 * peak.most


# --- time ----------------------------------------------------------------------------------------


def test_times_are_said_in_units_that_suit() -> None:
    assert str(Estimate(12.4, 10**6, "cpu")) == (
        "about 12 s on cpu, and 1.0 MB of memory beside the model"
    )
    assert str(Estimate(150.0, 10**9, "cuda:0")).startswith("about 2 min on cuda:0, and 1.0 GB of")
    assert str(Estimate(3600.0 * 25 + 100, 10**9, "cpu")).startswith("about 25 h 2 min")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every piece of the rehearsal take a second, so that nothing depends on the machine."""
    rehearsal = importlib.import_module("secateur.reconstruct.rehearsal")
    monkeypatch.setattr(rehearsal, "_seconds", lambda run: 1.0)
    solved = Solved(0.0, 1.0, 1, 1)
    monkeypatch.setattr(rehearsal, "_solve", lambda *given: (solved, {}))
    monkeypatch.setattr(Solved, "scaled_to", lambda self, stage: 1.0)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("count", "held"), [(4, 1), (16, 2)])
def test_the_time_is_that_of_passes_solutions_and_steps(count: int, held: int) -> None:
    """Two blocks of four stages and two half-blocks each; 4 epochs, and a look before them.

    A batch runs through a block three times, and up to each of its stages: these take 3, 1, 2 and 2
    of the 8 WIDTH^2 of work, so the runs are 3 + 4 + 6 eighths of one. It is summed up four times,
    for two Gram matrices.
    """
    found = told(decoder(), tokens(count))
    batch = 3 + (3 + 4 + 6) / 8 + 4 * 2
    trained = 4 * (count - held) * 2 + 5 * held * 2
    assert found.seconds == pytest.approx(2 * (count * batch + 4 + trained))
    dear = told(decoder(), tokens(count), method=sc.thorough)
    # The gradients, the dense outputs with them, and Adam for 3 of 16 weights.
    step, looks = 1 + 16 / 3, 6 * held
    assert dear.seconds == pytest.approx(found.seconds + 4 * (count - held) * step + looks)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("count", "held"), [(4, 1), (16, 2)])
def test_the_time_on_a_grid_has_all_that_it_adds(count: int, held: int) -> None:
    """Half as many epochs again, and what layers see: after each half-block, and at the end.

    Each look at a half-block's inputs is a run and the sums of two Gram matrices.
    """
    found = told(decoder(), tokens(count), method=replace(sc.best, grid=sc.Int4()))
    batch = 3 + (3 + 4 + 6) / 8 + 4 * 2 + (2 + 4 * 2)
    trained = 6 * (count - held) * 2 + 8 * held * 2
    assert found.seconds == pytest.approx(2 * (count * batch + 4 + trained))
    dear = told(decoder(), tokens(count), method=replace(sc.thorough, grid=sc.Int4()))
    step = 1 + 16 / 3
    on_grid = step + 16 / 3
    steps = (count - held) * (4 * step + 2 * on_grid)
    assert dear.seconds == pytest.approx(found.seconds + 2 * count * batch + steps + 6 * held)


@pytest.mark.usefixtures("clock")
def test_batches_count_by_their_size() -> None:
    (whole,) = tokens(1)
    halves = told(decoder(), [*tokens(2), whole[:2], whole[:2]])
    assert halves.seconds < told(decoder(), tokens(4)).seconds
    assert halves.seconds > told(decoder(), tokens(2)).seconds


def test_an_estimate_changes_nothing() -> None:
    model = decoder().train()
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    asked = [p.requires_grad for p in model.parameters()]
    assert told(model, tokens(), method=sc.thorough).seconds > 0
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random) and model.training
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()


def test_a_method_that_takes_gradients_has_no_estimate() -> None:
    with pytest.raises(ValueError, match=r"estimate has no gradients, .*taylor.* needs gradient"):
        told(decoder(), tokens(), method=sc.blockwise(taylor))


# --- told before it starts -----------------------------------------------------------------------


def test_it_is_told_before_a_weight_is_touched(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()

    def interrupted(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.prune.passes.observe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sc.reconstruct_(model, "2:4", sc.best, tokens())
    said = capsys.readouterr()
    expected = f"{told(model, tokens()).bytes / 1e6:.1f}"
    assert re.search(
        rf"blockwise\(alps\): about \d+ s on cpu, and {expected} MB of memory", said.err
    )
    assert said.out == ""
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_methods_whose_memory_is_not_counted_say_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sc.reconstruct_(decoder(), "2:4", sc.blockwise(sc.sparsegpt, epochs=1), tokens())
    assert "memory beside the model" not in capsys.readouterr().err


def test_a_model_that_cannot_run_is_refused_as_always() -> None:
    with pytest.raises(ValueError, match="Decoder cannot run calibration batch 0, Tensor"):
        sc.reconstruct_(decoder(), "2:4", sc.best, [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)])


# --- matrices inside other parameters ------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_matrix_is_counted_and_left_as_it_was(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (model, batches), (same, _) = problem(kind, 2), problem(kind)
    plan = sc.plan(model, "2:4")
    found = estimate(model, match(model, plan), plan.layers, batches, sc.thorough)
    assert found.seconds > 0
    for one, other in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(one, other) and one.grad is None
    sc.reconstruct_(model, plan, sc.best, batches)
    assert "blockwise(alps): about " in capsys.readouterr().err


def test_experts_have_gram_matrices_and_inputs_of_their_own() -> None:
    """Of 4 experts: 4 sums for each but one more while one is solved; each keeps its inputs."""
    one, four = (
        [Stage("b", ("up",) * n, ((4, 32),) * n, 10, n), Stage("b", ("o",), ((4, 4),), 10)]
        for n in (1, 4)
    )
    solving = 4 * ((9 + 4 * 3) * 32**2 + 14 * 4 * 32)
    assert peak_bytes(four, 0, 4) == solving
    assert peak_bytes(one, 0, 4) == 4 * (9 * 32**2 + 14 * 4 * 32)
    wide = [Stage("b", ("up",) * 4, ((64, 8),) * 4, 1000, 4)]
    kept = 1000 * (4 * 8 + 2 * 4 * 64)
    assert peak_bytes(wide, 0, 4) == 4 * 4 * 4 * 8**2 + 28 * 4 * 64 * 8 + 4 * kept


def test_an_expert_without_a_token_in_the_first_batch_stops_no_estimate() -> None:
    model, batches = problem("Qwen3Moe", 2)
    assert told(model, [batches[0][:1, :1], batches[1]]).seconds > 0
