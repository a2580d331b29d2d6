"""A window on a model, and blocks recorded without running them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.model.blocks import FromPrevious, find_chains, record_all
from secateur.model.calibrate import observe
from secateur.model.layers import select
from secateur.model.window import Window, parts_of
from tests.models import Decoder


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder().eval()


def tokens(batches: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(20, (2 + i, 6), generator=generator) for i in range(batches)]


def windowed(model: nn.Module) -> tuple[Window, Counter[str]]:
    """A window on the model, whose weights are removed, and how often each part is read."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = select(model).layers
    (chain,) = find_chains(model, layers).values()
    reads: Counter[str] = Counter()

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        reads[next(p for p in parts_of(model, chain) if names[0].startswith(f"{p}."))] += 1
        return {name: state[name] for name in names}

    model.to("meta")
    return Window(model, chain, read, torch.device("cpu")), reads


def held(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.is_meta}


def test_parts_are_the_blocks_and_what_is_around_them() -> None:
    model = decoder()
    (chain,) = find_chains(model, select(model).layers).values()
    assert list(parts_of(model, chain)) == [
        "embed", "blocks.0", "blocks.1", "blocks.2", "lm_head",
    ]  # fmt: skip
    model.pooler = nn.MultiheadAttention(16, 2)
    assert list(parts_of(model, chain))[-1] == "pooler"
    model.register_buffer("scale", torch.ones(1))
    with pytest.raises(ValueError, match="Decoder has tensors beside the blocks inside it"):
        parts_of(model, chain)


class Pooled(nn.Module):
    """A decoder whose outputs go through attention, and once more through its output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = decoder()
        self.pooler = nn.MultiheadAttention(20, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.decoder(ids)
        pooled: Tensor = self.pooler(x, x, x, need_weights=False)[0]
        return self.pooler.out_proj(pooled)


def test_what_is_inside_a_part_loads_all_of_it() -> None:
    torch.manual_seed(0)
    model, x = Pooled().eval(), tokens(1)[0]
    with torch.no_grad():
        expected = model(x)
    window, reads = windowed(model)
    with window.opened(), torch.no_grad():
        assert torch.equal(model(x), expected)
        assert held(model) == {f"pooler.{n}" for n, _ in model.pooler.named_parameters()}
        window.drop()
        model.pooler.out_proj(expected)
    assert reads["pooler"] == 2 and not held(model)


def test_what_is_called_takes_the_place_of_what_was() -> None:
    model, x = decoder(), tokens(1)[0]
    expected = model(x)
    window, reads = windowed(model)
    with window.opened():
        assert torch.equal(model(x), expected)
        assert held(model) == {"lm_head.weight", "lm_head.bias"}
        window.load("blocks.1")
        window.load("blocks.1")
        assert {name.rsplit(".", 1)[0][:8] for name in held(model)} == {"blocks.1"}
        assert reads["blocks.1"] == 2
    assert not held(model)
    assert "forward" not in vars(model.blocks[0])


def test_statistics_through_a_window_are_those_of_the_whole_model() -> None:
    """Blocks are read four times, whether there are two batches or five."""
    for batches in (2, 5):
        model = decoder()
        layers = select(model).layers
        expected = list(observe(model, layers, tokens(batches), ["gram"], sequential=True))
        window, reads = windowed(model)
        with window.opened():
            found = observe(
                model, layers, tokens(batches), ["gram"], sequential=True, window=window
            )
            for one, two in zip(found, expected, strict=True):
                assert (one.block, one.tokens) == (two.block, two.tokens)
                for name, statistics in one.statistics.items():
                    assert torch.equal(statistics["gram"], two.statistics[name]["gram"])
        assert reads["blocks.1"] == reads["blocks.2"] == 4
        assert reads["blocks.0"] <= 5


class Scaled(nn.Module):
    """Every block also receives a tensor computed from the hidden state between blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ScaledBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, x.mean())
        return x


class ScaledBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.linear(x) * scale


def calls(recorded: Any) -> list[Any]:
    return [
        [x if isinstance(x, FromPrevious | bool | None) else x.tolist() for x in call.leaves]
        for of_batch in recorded
        for call in of_batch
    ]


def test_blocks_that_do_not_run_are_recorded_as_if_they_did() -> None:
    model = decoder()
    (chain,) = find_chains(model, select(model).layers).values()
    with torch.no_grad():
        expected = record_all(model, chain, tokens(3), False)
        before = [block.forwards for block in model.blocks]
        found = record_all(model, chain, tokens(3), False, stand_in=True)
    assert found is not None and calls(found) == calls(expected)
    runs = [b.forwards - n for b, n in zip(model.blocks, before, strict=True)]
    assert runs == [3, 2, 2]  # recorded and replayed for the first batch; the first once more


def test_blocks_whose_arguments_come_from_others_are_not_recorded_so() -> None:
    scaled, widening = Scaled(), nn.Sequential(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)))
    x = [torch.randn(3, 8)]
    with torch.no_grad():
        chain = dict(scaled.blocks.named_children())
        assert record_all(scaled, chain, x, False) is not None
        assert record_all(scaled, chain, x, False, stand_in=True) is None
        wide = dict(widening[0].named_children())
        assert record_all(widening, wide, x, False) is not None
        assert record_all(widening, wide, x, False, stand_in=True) is None


def test_a_model_that_cannot_run_part_by_part_is_an_error() -> None:
    model = Scaled().eval()
    layers = select(model).layers
    window, _ = windowed(model)
    with (
        window.opened(),
        pytest.raises(ValueError, match="blocks of this Scaled cannot run one by one"),
    ):
        list(observe(model, layers, [torch.randn(3, 8)], ["gram"], sequential=True, window=window))
