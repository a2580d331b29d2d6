"""LSTM, GRU and RNN: their matrices are layers, and see what an unrolled model multiplies."""

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import secateur as sc
from secateur.criteria.taylor import taylor
from secateur.model.layers import layers_of
from secateur.model.recurrent import gates_of
from secateur.report.inspection import inspect
from tests.model.test_attention import gram, grams

IN, HIDDEN = 8, 12
CELLS: dict[type[nn.RNNBase], Any] = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}
KINDS = pytest.mark.parametrize("kind", CELLS, ids=lambda kind: kind.__name__)


class Wrapped(nn.Module):
    """A recurrent module that is handed a batch's tensors, packed where it has lengths."""

    def __init__(self, module: nn.Module, batch_first: bool = False) -> None:
        super().__init__()
        self.rnn, self.batch_first = module, batch_first

    def forward(self, x: Tensor, lengths: Tensor | None = None, hx: Any = None) -> Any:
        if lengths is not None:
            x = pack_padded_sequence(x, lengths, self.batch_first, enforce_sorted=False)
        return self.rnn(x, hx)[0]


def unrolled(module: nn.RNNBase, sequences: list[Tensor], hx: Any) -> dict[str, list[Tensor]]:
    """What each matrix multiplies, step by step in float64; `hx` is [layers, sequences, hidden]."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    state = {name: p.double() for name, p in module.state_dict().items()}
    ways = ["", "_reverse"] if module.bidirectional else [""]
    inputs = [x.double() for x in sequences]
    for layer in range(module.num_layers):
        outputs: list[list[Tensor]] = [[] for _ in inputs]
        for way, suffix in enumerate(ways):
            at = f"_l{layer}{suffix}"
            cell = CELLS[type(module)](inputs[0].shape[1], HIDDEN).double()
            cell.load_state_dict({f"{key}": state[f"{key}{at}"] for key in cell.state_dict()})
            for i, x in enumerate(inputs):
                plane = layer * len(ways) + way
                each = None if hx is None else [h[plane, i].double() for h in hx]
                h = torch.zeros(HIDDEN).double() if each is None else each[0]
                c = torch.zeros_like(h) if each is None or len(each) == 1 else each[1]
                states = []
                for step in x.flip(0) if way else x:
                    seen[f"rnn.weight_ih{at}"].append(step)
                    seen[f"rnn.weight_hh{at}"].append(h)
                    h, c = cell(step, (h, c)) if module.mode == "LSTM" else (cell(step, h), c)
                    states.append(h)
                outputs[i].append(torch.stack(states[::-1] if way else states))
        inputs = [torch.cat(of_each, 1) for of_each in outputs]
    return seen


@KINDS
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layers, both", [(1, False), (1, True), (3, False), (2, True)])
@pytest.mark.parametrize("packed, given", [(False, False), (False, True), (True, True)])
@torch.no_grad()
def test_each_matrix_sees_what_an_unrolled_model_multiplies(
    kind: type[nn.RNNBase], batch_first: bool, layers: int, both: bool, packed: bool, given: bool
) -> None:
    torch.manual_seed(0)
    module = kind(IN, HIDDEN, layers, batch_first=batch_first, bidirectional=both)
    x, lengths = torch.randn(3, 7, IN), [5, 7, 2] if packed else [7, 7, 7]
    planes = layers * (2 if both else 1)
    hx = [torch.randn(planes, 3, HIDDEN) for _ in range(2 if kind is nn.LSTM else 1)]
    start = None if not given else tuple(hx) if kind is nn.LSTM else hx[0]
    inputs = x if batch_first else x.transpose(0, 1)
    batch = {"x": inputs, "lengths": torch.tensor(lengths) if packed else None, "hx": start}
    found = grams(Wrapped(module, batch_first).eval(), [batch])
    rows = [one[:length] for one, length in zip(x, lengths, strict=True)]
    expected = unrolled(module, rows, hx if given else None)
    assert found.keys() == expected.keys() == {f"rnn.{key}" for key in gates_of(module)}
    for name, seen in expected.items():
        torch.testing.assert_close(found[name], gram(torch.stack(seen)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_sequence_needs_no_batch() -> None:
    torch.manual_seed(0)
    for batch_first in (True, False):
        module = nn.GRU(IN, HIDDEN, 2, batch_first=batch_first)
        x, hx = torch.randn(7, IN), torch.randn(2, HIDDEN)
        found = grams(Wrapped(module).eval(), [{"x": x, "hx": hx}])
        for name, seen in unrolled(module, [x], [hx[:, None]]).items():
            torch.testing.assert_close(found[name], gram(torch.stack(seen)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sequences_that_were_packed_before_are_read_as_they_are() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(IN, HIDDEN, bidirectional=True)
    rows = [torch.randn(n, IN) for n in (2, 6, 3)]
    found = grams(Packed(module).eval(), [{"rows": tuple(rows)}])
    for name, seen in unrolled(module, rows, None).items():
        torch.testing.assert_close(found[name], gram(torch.stack(seen)), atol=1e-5, rtol=1e-5)


class Packed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.rnn = module

    def forward(self, rows: tuple[Tensor, ...]) -> Any:
        return self.rnn(pack_sequence(rows, enforce_sorted=False))[0].data


@torch.no_grad()
def test_states_that_an_lstm_projects_are_seen_and_the_projection_is_no_layer() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(IN, HIDDEN, proj_size=4)
    assert list(gates_of(module)) == ["weight_ih_l0", "weight_hh_l0"]
    x = torch.randn(7, 3, IN)
    found = grams(Wrapped(module).eval(), [x])
    before = torch.cat([torch.zeros(1, 3, 4), module(x)[0][:-1]])
    torch.testing.assert_close(found["rnn.weight_hh_l0"], gram(before), atol=1e-6, rtol=1e-5)
    plan = sc.plan(Wrapped(module), "2:4")
    assert plan.left["parameters of LSTM"] == 4 * HIDDEN


class ByHand(nn.Module):
    """A cell that is stepped by hand."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.rnn = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        outputs = []
        for step in x:
            state = self.rnn(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


@KINDS
@torch.no_grad()
def test_a_cell_that_is_stepped_by_hand_is_seen_step_by_step(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model, x = ByHand(CELLS[kind](IN, HIDDEN)).eval(), torch.randn(7, 3, IN)
    found = grams(model, [x])
    before = torch.cat([torch.zeros(1, 3, HIDDEN), model(x)[:-1]])
    torch.testing.assert_close(found["rnn.weight_ih"], gram(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["rnn.weight_hh"], gram(before), atol=1e-6, rtol=1e-5)


class Tagger(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(IN, HIDDEN, 2, batch_first=True, bidirectional=True, dropout=0.2)
        self.head = nn.Linear(2 * HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.rnn(x)[0])
        return found


def tagger(kind: type[nn.RNNBase] = nn.LSTM) -> Tagger:
    torch.manual_seed(0)
    return Tagger(kind).eval()


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 9, IN, generator=generator) for _ in range(4)]


@KINDS
@pytest.mark.parametrize(
    ("verb", "method"),
    [
        (sc.prune_, sc.magnitude),
        (sc.prune_, sc.wanda),
        (sc.prune_, taylor),
        (sc.reconstruct_, sc.sparsegpt),
        (sc.reconstruct_, sc.alps),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_goes_the_whole_way(kind: Any, verb: Any, method: Any, tmp_path: Path) -> None:
    model, batches = tagger(kind), sequences()
    plan = sc.plan(model, "2:4")
    assert plan.weights + sum(plan.left.values()) == sum(p.numel() for p in model.parameters())
    assert len(plan.layers) == 8 + 1
    loss = {"loss": lambda output, batch: output.square().mean()} if method is taylor else {}
    report = verb(model, plan, method, batches, **loss)
    assert sc.check(model, plan) == dict.fromkeys(plan.layers, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with sc.hold(model, optimizer):
        model.train()(batches[0]).square().mean().backward()
        optimizer.step()
    model.eval()
    sc.check(model, plan)
    sc.save(model, tmp_path / "out", plan=plan, reports=[report])
    loaded = sc.load(tmp_path / "out", tagger(kind))
    assert torch.equal(loaded(batches[0]), model(batches[0]))
    sc.check(loaded, plan)


def test_each_matrix_is_reconstructed_on_what_the_pruned_ones_before_it_pass_on() -> None:
    """SparseGPT of the second layer's inputs, by a Gram matrix from the pruned first layer."""
    model, batches = tagger(), sequences()
    dense = copy.deepcopy(model)
    sc.reconstruct_(model, sc.plan(model, "2:4", layers=nn.LSTM), sc.sparsegpt, batches)
    first = nn.LSTM(IN, HIDDEN, batch_first=True, bidirectional=True)
    names = first.state_dict()
    first.load_state_dict({name: model.rnn.state_dict()[name] for name in names})
    with torch.no_grad():
        seen = gram(torch.cat([first(x)[0] for x in batches]))
    expected = sc.sparsegpt(dense.rnn.weight_ih_l1.detach(), seen, sc.NM(2, 4)).weight
    torch.testing.assert_close(model.rnn.weight_ih_l1.detach(), expected, atol=1e-5, rtol=1e-4)


def test_dropout_and_what_was_patched_are_back_afterwards() -> None:
    model, batches = tagger().train(), sequences()
    sc.prune_(model, "2:4", sc.wanda, batches)
    assert model.training and all("forward" not in vars(module) for module in model.modules())


def test_what_computes_something_else_is_left_alone() -> None:
    class Scaled(nn.GRU):
        def forward(self, x: Tensor, hx: Any = None) -> Any:
            out, last = super().forward(2 * x, hx)
            return out, last

    assert gates_of(Scaled(IN, HIDDEN)) == {} and gates_of(nn.Linear(2, 2)) == {}
    normed = nn.utils.parametrizations.weight_norm(nn.GRU(IN, HIDDEN), "weight_hh_l0")
    assert list(gates_of(normed)) == ["weight_ih_l0"]


def test_they_are_selected_by_name_glob_and_type() -> None:
    model = tagger()
    assert list(sc.plan(model, "2:4", layers="rnn.weight_hh_l1_reverse").layers) == [
        "rnn.weight_hh_l1_reverse"
    ]
    assert len(sc.plan(model, "2:4", layers="*.weight_hh_*").layers) == 4
    assert len(sc.plan(model, "2:4", layers=nn.LSTM).layers) == 8
    assert len(sc.plan(model, "2:4", layers="rnn").layers) == 8
    assert list(sc.plan(model, "2:4", ignore="rnn").layers) == ["head"]
    assert list(sc.plan(model, "2:4", layers=nn.Linear).layers) == ["head"]
    found = {row.layer: row for row in inspect(model).layers}
    assert (found["rnn.weight_ih_l1"].kind, found["rnn.weight_ih_l1"].shape) == ("LSTM", (48, 24))
    assert list(layers_of(nn.LSTM(2, 2))) == ["weight_ih_l0", "weight_hh_l0"]
