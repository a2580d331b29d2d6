"""What a small language model loses that is trained from scratch in 2:4, as long as dense.

    python -m bench.run.from_scratch [--steps 600] [--seeds 0,1]

The model reads bytes of Python's own standard library: two blocks of width 96, whose linear layers
get the pattern. All ways have the same first weights, batches, AdamW and learning rate, which falls
to a tenth along a cosine. A row is the loss in nats a byte on files that no way has seen, and how
many of the planned weights the last choice of masks exchanged.
"""

import math
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from bench.lib.command import parser_of
from bench.lib.rows import Row, append
from secateur.train import SoftThreshold, StraightThrough, learn_masks_, rigl
from secateur.train.schedules import cubic

PATTERN = "2:4"
WIDTH, HEADS, BLOCKS, WINDOW, BATCH = 96, 4, 2, 128, 8
PEAK, WARMUP, LAST = 2e-3, 0.05, 0.1  # of the learning rate: its peak, rise and end
EVERY = 20  # steps between the choices of rules that do not choose at each
VALIDATION = 64  # windows
BYTES = 4_000_000  # of text, of which each tenth file is held out

# (model, plan, optimizer, steps) -> what holds or learns the masks while it trains
Way = Callable[[nn.Module, sc.Plan, torch.optim.Optimizer, int], AbstractContextManager[Any]]


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a norm and beside the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Logits of the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(WINDOW, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.bytes(ids) + self.places.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]


def text() -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes held out, of whole files in the order of their names."""
    parts: tuple[bytearray, bytearray] = bytearray(), bytearray()
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for i, file in enumerate(files):
        if sum(map(len, parts)) < BYTES:
            parts[i % 10 == 9].extend(file.read_bytes())
    train, held_out = (torch.frombuffer(part, dtype=torch.uint8).long() for part in parts)
    return train, held_out


def windows(data: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Runs of bytes, each with the one that follows it."""
    starts = torch.randint(len(data) - WINDOW, (count,), generator=generator)
    return torch.stack([data[start : start + WINDOW + 1] for start in starts.tolist()])


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def rate(step: int, steps: int) -> float:
    """Linear up to 1, then half a cosine down to a tenth."""
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return LAST + (1 - LAST) / 2 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


# --- ways -----------------------------------------------------------------------------------------


def _held(model: nn.Module, plan: sc.Plan, optimizer: Any, steps: int) -> Any:
    sc.prune_(model, plan, sc.magnitude)
    return sc.hold(model, optimizer)


def _rigl(model: nn.Module, plan: sc.Plan, optimizer: Any, steps: int) -> Any:
    sc.prune_(model, plan, sc.criteria.random)
    return sc.hold(model, optimizer, rigl(plan, end=round(0.75 * steps), every=EVERY))


def _gradual(model: nn.Module, plan: sc.Plan, optimizer: Any, steps: int) -> Any:
    schedule = cubic(0.5, begin=round(0.1 * steps), end=round(0.6 * steps))
    return sc.hold(model, optimizer, sc.gradual(plan, schedule, every=EVERY))


def _learnt(rule: Any) -> Way:
    return lambda model, plan, optimizer, steps: learn_masks_(model, plan, optimizer, rule)


WAYS: dict[str, Way] = {
    "dense": lambda model, plan, optimizer, steps: nullcontext(),
    "zeros from the start, held": _held,
    "RigL": _rigl,
    "gradual": _gradual,
    "STE": _learnt(StraightThrough()),
    "SR-STE": _learnt(StraightThrough(2e-4)),
    "S-STE": _learnt(SoftThreshold()),
}


def trained(way: Way, seed: int, steps: int, data: Tensor) -> tuple[nn.Module, Any]:
    """The model behind its training, which has the pattern unless it is dense, and what held it."""
    torch.manual_seed(seed)
    model = Model()
    plan = sc.plan(model, PATTERN, layers=["blocks.*"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    generator = torch.Generator().manual_seed(seed)
    with way(model, plan, optimizer, steps) as masks:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model, windows(data, BATCH, generator)).backward()
            optimizer.step()
            schedule.step()
    if masks is not None:
        sc.check(model, plan)
    return model, masks


def rows(steps: int, seeds: Sequence[int]) -> Iterator[Row]:
    train, held_out = text()
    test = windows(held_out, VALIDATION, torch.Generator().manual_seed(0))
    for seed in seeds:
        for name, way in WAYS.items():
            begin = monotonic()
            model, masks = trained(way, seed, steps, train)
            moves = getattr(masks, "moves", {}).values()
            with torch.no_grad():
                loss = float(loss_of(model, test))
            row = {"way": name, "seed": seed, "steps": steps, "loss": f"{loss:.4f}"}
            row |= {"exchanged": sum(move.grown for move in moves)}
            yield {**row, "seconds": f"{monotonic() - begin:.0f}"}
            print(row, flush=True)


def main(words: Sequence[str] | None = None) -> None:
    parser = parser_of("from_scratch", __doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", default="0,1")
    arguments = parser.parse_args(words)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    print(append(arguments.output, "from-scratch", list(rows(arguments.steps, seeds)), "cpu"))


if __name__ == "__main__":
    main()
