"""What pruning one layer costs: the right number in every cell, and a model that never changes."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.allocation import Sensitivity, read_sensitivity, sensitivity
from secateur.model.evaluate import perplexity


def hand_made() -> nn.Sequential:
    """Two layers whose weights are small integers."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0, 3.0, -4.0], [5.0, 1.0, 1.0, 7.0]]))
        model[1].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 1.0], [-0.0, 4.0]]))
    return model


def lost_energy(model: nn.Module) -> float:
    """Minus the energy of all weights: pruning raises it by what was pruned."""
    return -sum(float(p.square().sum()) for p in model.parameters())


class Language(nn.Module):
    """A small causal language model of two blocks, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(11, 8)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 8))
                for _ in range(2)
            )
            self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(x)
        return logits


def rows(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(11, (4, 6), generator=generator).split(2))


def nll(model: nn.Module) -> float:
    return perplexity(model, rows(1)).nll


def bits(model: nn.Module) -> dict[str, list[int]]:
    """Whether two tensors are equal to the bit; `==` takes minus zero for zero."""
    return {n: t.contiguous().view(torch.int32).tolist() for n, t in model.state_dict().items()}


def test_each_cell_is_what_the_pruned_layer_alone_costs() -> None:
    model = hand_made()
    found = sensitivity(model, ["2:4", "unstructured:0.5@layer", sc.NM(1, 2)], lost_energy)
    assert found.patterns == ("2:4", "unstructured:0.5@layer", "1:2")
    assert found.loss == -(30 + 76 + 31)
    # rows of layer 0: 2:4 drops 1 and 2, and 1 and 1; of the whole layer the four smallest go
    assert found.increase["0"] == {"2:4": 7.0, "unstructured:0.5@layer": 7.0, "1:2": 1 + 9 + 1 + 1}
    # [1 2], [3 1], [0 4]: half of the six are three, the zero and both ones
    assert found.increase["1"] == {"2:4": None, "unstructured:0.5@layer": 2.0, "1:2": 2.0}
    assert found.why_not == {"1": {"2:4": "2:4 needs in_features of at least 4, got 2"}}
    assert found.shapes == {"0": (2, 4), "1": (3, 2)}


def test_numbers_are_rounded_where_a_grid_is_named() -> None:
    """What is on the grid, as row 1 is, loses nothing by it."""
    model = hand_made()
    model[0].weight.data[0, 0] = 0.4
    weight, grid = model[0].weight.detach().clone(), sc.Int4()
    scales = grid.scales(weight)
    rounded = grid.dequantised(grid.codes(weight, scales), scales)
    assert torch.equal(rounded[1], weight[1]) and not torch.equal(rounded[0], weight[0])
    before = copy.deepcopy(model.state_dict())
    found = sensitivity(model, ["dense+int4", "1:4+int4"], lost_energy, layers=["0"])
    increase = found.increase["0"]
    lost = float(weight.square().sum() - rounded.square().sum())
    assert increase["dense+int4"] == pytest.approx(lost, abs=1e-5) and lost != 0
    assert increase["1:4+int4"] == pytest.approx(0.16 + 4 + 9 + 25 + 1 + 1, rel=1e-5)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    wide = sensitivity(hand_made().double(), ["1:2", "dense+int4"], lost_energy)
    assert wide.increase["0"]["dense+int4"] is None
    assert "needs float32 or 16 bits, got torch.float64" in wide.why_not["0"]["dense+int4"]


def test_groups_of_a_convolution_lie_along_its_channels() -> None:
    """2 x 2 positions of 6 channels are 24 columns, which 4 divides, but not the 6."""
    model = nn.Sequential(nn.Conv2d(6, 1, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 7).view(1, 6, 1, 1).expand(1, 6, 2, 2))
    found = sensitivity(model, ["2:4", "2:4@pad-remainder"], lambda m: -float(m[0].weight.sum()))
    assert found.increase["0"] == {"2:4": None, "2:4@pad-remainder": 4 * (1 + 2)}
    assert found.why_not == {"0": {"2:4": "2:4 needs in_channels divisible by 4, got 6"}}


def test_layers_are_selected_as_everywhere() -> None:
    found = sensitivity(Language(), ["2:4"], nll, layers=["blocks.*"], ignore=["*.1.3"])
    assert list(found.increase) == ["blocks.0.0", "blocks.0.3", "blocks.1.0"]
    assert found.skipped == {"blocks.1.3": "ignored"}


@pytest.mark.parametrize("criterion", [sc.magnitude, sc.wanda, sc.criteria.random])
def test_a_cell_is_what_prune_of_that_layer_alone_costs(criterion: Callable[..., Tensor]) -> None:
    model = Language().train()
    before = bits(model)
    patterns = ["2:4", "unstructured:0.8"]
    found = sensitivity(model, patterns, nll, criterion=criterion, batches=rows(0))
    assert bits(model) == before
    assert model.training and model.blocks[0].training
    assert list(found.increase) == ["blocks.0.0", "blocks.0.3", "blocks.1.0", "blocks.1.3", "head"]
    for name, increase in found.increase.items():
        for pattern in patterns:
            pruned = copy.deepcopy(model)
            sc.prune_(pruned, sc.plan(pruned, pattern, layers=[name]), criterion, rows(0))
            assert increase[pattern] == nll(pruned) - nll(model) != 0, (name, pattern)


def test_wanda_needs_batches_and_sees_them() -> None:
    with pytest.raises(ValueError, match="wanda needs calibration data for input_norm: pass batch"):
        sensitivity(Language(), ["2:4"], nll, criterion=sc.wanda)
    one = sensitivity(Language(), ["2:4"], nll, criterion=sc.wanda, batches=rows(0))
    other = sensitivity(Language(), ["2:4"], nll, criterion=sc.wanda, batches=[rows(0)[0][:1, :1]])
    assert one.increase != other.increase


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_as_it_was_when_the_loss_is_interrupted(error: type[BaseException]) -> None:
    model, calls = hand_made().train(), 0

    def failing(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            assert model[0].weight.count_nonzero() == 4  # inside: the layer is pruned
            assert not model.training
            raise error
        return lost_energy(model)

    before = bits(model)
    with pytest.raises(error):
        sensitivity(model, ["unstructured:0.2", "2:4"], failing)
    assert bits(model) == before
    assert model.training


def test_an_interrupted_call_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, calls = tmp_path / "sense.json", 0

    def counting(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return nll(model)

    model = Language()
    call = partial(sensitivity, model, ["2:4", "1:4"], criterion=sc.wanda, batches=rows(0))
    with pytest.raises(KeyboardInterrupt):
        call(counting, checkpoint=path)
    assert [p.name for p in tmp_path.iterdir()] == ["sense.json"]
    resumed = call(counting, checkpoint=path)
    # the dense loss, and two of ten cells are known
    assert calls == 4 + 1 + 8
    assert resumed == call(nll)
    again = call(counting, checkpoint=path)
    assert (calls, again) == (14, resumed)
    more = sensitivity(
        model, ["2:4", "4:8"], counting, criterion=sc.wanda, batches=rows(0), checkpoint=path
    )
    assert calls == 14 + 1 + 5
    assert more.increase["head"]["2:4"] == resumed.increase["head"]["2:4"]


def test_a_checkpoint_of_another_call_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sense.json"
    sensitivity(Language(), ["2:4"], nll, checkpoint=path)
    with pytest.raises(ValueError, match=r"sense.json belongs to another call, its criterion diff"):
        sensitivity(Language(), ["2:4"], nll, criterion=sc.criteria.random, checkpoint=path)
    with pytest.raises(ValueError, match="belongs to another call, its layers differs: choose"):
        sensitivity(hand_made(), ["2:4"], lost_energy, checkpoint=path)
    with pytest.raises(
        ValueError, match=r"has a dense loss of .*: the data or the loss has changed: choose"
    ):
        sensitivity(Language(), ["2:4"], lambda m: 2 * nll(m), checkpoint=path)
    path.write_text("{")
    with pytest.raises(
        ValueError,
        match=r"sense.json is no checkpoint of sensitivity: a line cannot be read as JSON",
    ):
        sensitivity(Language(), ["2:4"], nll, checkpoint=path)
    path.write_text('{"fingerprint": 1, "loss": 1, "increase": {}}')
    with pytest.raises(
        ValueError, match=r"sense.json is no checkpoint of sensitivity: .*choose another"
    ):
        sensitivity(Language(), ["2:4"], nll, checkpoint=path)


def test_sense_errors() -> None:
    model = hand_made()
    with pytest.raises(ValueError, match="needs a list of patterns, got '2:4': such as"):
        sensitivity(model, "2:4", lost_energy)
    with pytest.raises(ValueError, match=r"needs a list of patterns, got \[\]"):
        sensitivity(model, [], lost_energy)
    with pytest.raises(ValueError, match="unknown pattern '2-4'"):
        sensitivity(model, ["2-4"], lost_energy)
    with pytest.raises(ValueError, match="needs a finite loss, got nan for the dense model"):
        sensitivity(model, ["2:4"], lambda m: float("nan"))

    def breaking(model: nn.Module) -> float:
        return float("inf") if (model[0].weight == 0).any() else 1.0

    with pytest.raises(ValueError, match=r"got inf for 0 pruned to 2:4: .* or ignore the layer"):
        sensitivity(model, ["2:4"], breaking)

    def scoreless(weight: Tensor) -> Tensor:
        return weight / 0 * 0

    with pytest.raises(ValueError, match=r"criterion scoreless needs to give scores .* with 8 NaN"):
        sensitivity(model, ["2:4"], lost_energy, criterion=scoreless)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"0.weight has no data \(meta device\)"):
        sensitivity(empty, ["2:4"], lost_energy)


def test_it_prints_a_table_and_the_reasons() -> None:
    text = str(sensitivity(hand_made(), ["2:4", "1:2"], lost_energy))
    assert "layer  out  in      2:4       1:2\n" in text
    assert "\n    1    3   2        -   +2.0000\n" in text
    assert "over the dense model's -137.0000, one layer pruned by magnitude" in text
    assert "not measured:\n  1, 2:4: 2:4 needs in_features of at least 4, got 2" in text


def test_it_can_be_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "sense.json"
    found = sensitivity(hand_made(), ["2:4", "1:2"], lost_energy, ignore=[])
    found.write(path)
    assert read_sensitivity(path) == found

    def refused(message: str, **changes: Any) -> None:
        path.write_text(json.dumps(found.to_dict() | changes))
        with pytest.raises(ValueError, match=message):
            read_sensitivity(path)

    refused("sense.json is a sensitivity of version 7, this library reads 1", version=7)
    refused("sense.json is no sensitivity: at loss: Input should be a valid number", loss="low")
    refused("is no sensitivity: at module: Extra inputs are not permitted", module="os")
    refused("is no sensitivity: at layers.0: not all its patterns", patterns=["2:4"])
    path.write_text("[]")
    with pytest.raises(ValueError, match="needs an object in braces, got a list"):
        read_sensitivity(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        read_sensitivity(tmp_path / "absent.json")


def test_a_sensitivity_is_plain_data() -> None:
    found = sensitivity(hand_made(), ["2:4"], lost_energy)
    assert isinstance(found, Sensitivity)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert found.to_dict()["layers"]["0"] == {
        "shape": [2, 4],
        "increase": {"2:4": 7.0},
        "why_not": {},
    }
