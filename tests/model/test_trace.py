"""What runs when: the order of calls, shared inputs, chains, and batches without padding."""

import pytest
import torch
from torch import nn

from secateur.model.distributed import ALONE
from secateur.model.layers import select
from secateur.model.trace import segments, trace_together, without_padding
from tests.models import ConvNet, Decoder, Experts

IDS = torch.arange(12).view(2, 6)


def test_layers_are_traced_in_the_order_of_their_calls_with_the_first_of_an_input() -> None:
    model = Decoder(blocks=1)
    layers = select(model).layers
    trace, parts = trace_together(model, layers, [IDS], without_padding(model, [IDS]), ALONE)
    assert [part.batch is IDS for part in parts] == [True]
    short = {name: name.removeprefix("blocks.0.").removeprefix("attention.") for name in layers}
    assert {short[name]: count for name, count in trace.calls.items()} == dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"), 1
    )
    followers = {short[name]: short[first] for name, first in trace.leader.items() if name != first}
    assert followers == {"k_proj": "q_proj", "v_proj": "q_proj"}


def test_a_layer_that_runs_twice_is_counted_twice() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(3, 4)
    trace, _ = trace_together(model, {"0": layer}, [x], without_padding(model, [x]), ALONE)
    assert trace.calls == {"0": 2}


def test_chains_and_the_layers_between_them_are_segments_in_order() -> None:
    model = ConvNet()
    layers = select(model).layers
    x = torch.randn(2, 4, 10, 10)
    trace, _ = trace_together(model, layers, [x], without_padding(model, [x]), ALONE)
    found = [(list(chain), list(names)) for chain, names in segments(model, layers, trace)]
    assert found == [
        ([], ["stem"]),
        (["stage1.0", "stage1.1"], [f"stage1.{i}.conv{j}" for i in (0, 1) for j in (1, 2)]),
        ([], ["down"]),
        (["stage2.0", "stage2.1"], [f"stage2.{i}.conv{j}" for i in (0, 1) for j in (1, 2)]),
        ([], ["fc"]),
    ]


def test_a_batch_of_padding_alone_is_not_counted() -> None:
    model = Decoder(blocks=1)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    batches = [
        {"input_ids": IDS, "attention_mask": torch.zeros_like(mask)},
        {"input_ids": IDS, "attention_mask": mask},
        {"input_ids": IDS, "attention_mask": torch.ones_like(mask)},
    ]
    parts = without_padding(model, batches)
    assert [(part.of, tuple(part.batch["input_ids"].shape)) for part in parts] == [
        (0, (1, 2)),
        (0, (1, 6)),
        (1, (2, 6)),
    ]
    with pytest.raises(ValueError, match="needs a token that is no padding, the 1 batches hold"):
        without_padding(model, batches[:1])


def test_layers_that_no_batch_reaches_are_named() -> None:
    model, x = Experts(), torch.full((4, 8), 0.25)
    layers = select(model).layers
    with pytest.raises(ValueError, match=r"layer experts.0 \(and 2 more\) received 0 tokens"):
        trace_together(model, layers, [x], without_padding(model, [x]), ALONE)
