"""The preset: what it is, and what it says it will take, held to counts by hand and to a run."""

import copy
import importlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import secateur as sc
from secateur.layers import select
from secateur.plan import match
from secateur.reconstruct import Estimate, estimate
from secateur.reconstruct.best import Stage, operations, peak_bytes
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
    """Those of one block by hand."""
    return [
        Stage("b", ((WIDTH, WIDTH),) * 3, count * TOKENS),
        Stage("b", ((WIDTH, WIDTH),), count * TOKENS),
        Stage("b", ((2 * WIDTH, WIDTH),), count * TOKENS),
        Stage("b", ((WIDTH, 2 * WIDTH),), count * TOKENS),
    ]


def test_it_is_half_blocks_on_alps() -> None:
    assert sc.best == sc.blockwise(sc.alps) and sc.best.name == "blockwise(alps)"


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
    layers = select(model).layers
    hidden = BATCHES * TOKENS * WIDTH * 4
    expected = peak_bytes(stages(), hidden, 4)
    assert estimate(model, layers, tokens()).bytes == expected
    assert estimate(model, layers, tokens(), offload=True).bytes == expected - 4 * hidden
    rest = [tokens(1)[0][:2], tokens(1)[0][:1]]  # batches count by their size
    smaller = estimate(model, layers, [*tokens(1), *rest]).bytes
    assert smaller == peak_bytes(stages(), hidden // BATCHES * 7 // 4, 4)


def test_convolutions_count_every_place_of_an_image() -> None:
    torch.manual_seed(0)
    model = ConvNet()
    layers = {n: m for n, m in select(model).layers.items() if n.startswith("stage1")}
    image = torch.randn(2, 4, 10, 10)
    of_block = [Stage("b", ((8, 72),), 200), Stage("b", ((8, 72),), 200)]
    found = estimate(model, layers, [image, image]).bytes
    assert found == peak_bytes(of_block, 2 * image.numel() * 2 * 4, 4)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made meanwhile held at once."""

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
        ("best", "PROBE", {"cpu": (8, 8)}),
        ("alps", "ITERATIONS", 6),  # each takes the same room
        ("refit", "TOLERANCE", 0.1),
    ):
        monkeypatch.setattr(importlib.import_module(f"secateur.reconstruct.{module}"), name, value)
    torch.manual_seed(0)
    model = Decoder(width=width, blocks=2)
    batches = list(torch.randint(20, (count, rows, LENGTH)))
    plan = sc.plan(model, "2:4", ignore=["blocks.0.*"])
    told = estimate(model, match(model, plan), batches).bytes
    with Peak() as peak:
        sc.reconstruct_(model, plan, sc.blockwise(sc.alps, epochs=1), batches)
    assert peak.most < told < 1.6 * peak.most


# --- time ----------------------------------------------------------------------------------------


def test_operations_are_counted_by_hand() -> None:
    count = 5 * TOKENS
    forwards, solving, cubes = operations(stages(5), epochs=4)
    assert forwards == 2 * count * 8 * WIDTH**2 * (3 + 4 + 4 * 4)
    assert cubes == (3 + 2**3) * WIDTH**3
    grams = 2 * count * (3 + 4) * WIDTH**2
    products = 2 * (4 * WIDTH + 2 * WIDTH + 4 * WIDTH) * WIDTH**2 * (2 * 100 + 50 + 5 * 50)
    assert solving == grams + products


def test_times_are_said_in_units_that_suit() -> None:
    assert str(Estimate(12.4, 10**6, "cpu")) == (
        "about 12 s on cpu, and 1.0 MB of memory beside the model"
    )
    assert str(Estimate(150.0, 10**9, "cuda:0")).startswith("about 2 min on cuda:0, and 1.0 GB of")
    assert str(Estimate(3600.0 * 25 + 100, 10**9, "cpu")).startswith("about 25 h 2 min")


def test_more_data_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rates that are given: nothing here depends on the machine."""
    module = importlib.import_module("secateur.reconstruct.best")  # not the value of that name
    monkeypatch.setattr(module, "_seconds", lambda run: 1.0)
    model = decoder()
    layers = select(model).layers
    one, four = (estimate(model, layers, tokens(n)).seconds for n in (1, 4))
    (f1, s1, c1), (f4, s4, _) = (operations([*stages(n), *other(n)], 4) for n in (1, 4))
    rate = 2.0 * 1024**3
    assert one == pytest.approx((f1 + s1) / rate + c1 / 384**3)
    assert four - one == pytest.approx((f4 - f1 + s4 - s1) / rate)


def other(count: int) -> list[Stage]:
    return [Stage("c", s.shapes, s.tokens) for s in stages(count)]


# --- told before it starts -----------------------------------------------------------------------


def test_it_is_told_before_a_weight_is_touched(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()

    def interrupted(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.run.observe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sc.reconstruct_(model, "2:4", sc.best, tokens())
    said = capsys.readouterr()
    expected = estimate(model, select(model).layers, tokens()).bytes
    assert f"blockwise(alps): about 0 s on cpu, and {expected / 1e6:.1f} MB of memory" in said.err
    assert said.out == ""
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_methods_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    sc.reconstruct_(decoder(), "2:4", sc.blockwise(sc.alps, epochs=1), tokens())
    assert "memory beside the model" not in capsys.readouterr().err


def test_a_model_that_cannot_run_is_refused_as_always() -> None:
    with pytest.raises(ValueError, match="Decoder cannot run calibration batch 0, Tensor"):
        sc.reconstruct_(decoder(), "2:4", sc.best, [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)])
