"""What the configurations of `bench.vit` cost in accuracy: a small vision transformer on digits.

    python -m bench.vision

The transformer is trained on the spot on scikit-learn's 8 x 8 digits, for each seed on another
split and from another start, in float32. A row is the top-1 on the digits left out, of one
configuration and seed: the weights made 2:4 by magnitude (`recovery` none), or refitted from the
dense ones by `reconstruct_` with `sparsegpt` (reconstruct), or these trained for some more epochs
with `hold` (train; dense weights as long, for comparison); then packed, and run on a CPU by the
formats' references. Nothing is chosen by the digits left out.
"""

import argparse
import copy
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur as sc
from bench.rows import Row, append
from bench.vit import CONFIGURATIONS, EVERYTHING, Configuration, Globs, named, prune

RESULTS = Path(__file__).parent / "results"
ABSENT = "bench.vision needs scikit-learn for its digits: pip install scikit-learn"
SIDE, PATCH = 8, 2  # pixels
CLASSES = 10
LARGEST = 16.0  # of a pixel
TRAINED_ON = 1200  # of 1797 digits; the others are left out
BATCH = 64
LEARNING_RATE = 2e-3
RECOVERY_RATE = 5e-4
NONE, RECONSTRUCT, TRAIN = "none", "reconstruct", "train"

# What `accelerate_` chooses depends on the device; this is the most that it may round, so it stands
# in for the configurations of ours.
VISION: dict[str, Configuration] = {
    **{name: one for name, one in CONFIGURATIONS.items() if not one.tried},
    "int8 dynamic 2:4 everything": Configuration(EVERYTHING, {EVERYTHING: "semi24_int8_dynamic"}),
}


@dataclass(frozen=True)
class Sizes:
    """Of the transformer, and how many epochs it is trained for, and trained on when pruned."""

    hidden: int = 32
    layers: int = 4
    heads: int = 4
    epochs: int = 40
    recovery_epochs: int = 10


TINY = Sizes(hidden=16, layers=1, heads=2, epochs=1, recovery_epochs=1)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*split)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(-2))
        return projected


class Mlp(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.lin2(functional.gelu(self.lin1(x)))
        return result


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(sizes.hidden), nn.LayerNorm(sizes.hidden)
        self.attn, self.mlp = Attention(sizes.hidden, sizes.heads), Mlp(sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class Transformer(nn.Module):
    """A vision transformer: patches, blocks with the names of SAM's, the mean, a head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, sizes.hidden, PATCH, PATCH)
        self.position = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, sizes.hidden))
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm, self.head = nn.LayerNorm(sizes.hidden), nn.Linear(sizes.hidden, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embed(pixels).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(self.norm(x).mean(1))
        return scores


@dataclass(frozen=True)
class Digits:
    """Pixels [n, 1, 8, 8] and labels, to train on and left out."""

    pixels: Tensor
    labels: Tensor
    other_pixels: Tensor
    other_labels: Tensor


def digits(seed: int) -> Digits:
    """scikit-learn's digits, split at random from the seed."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    flat, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
    pixels = torch.from_numpy(flat).float().view(-1, 1, SIDE, SIDE)[order] / LARGEST
    labels = torch.from_numpy(labels)[order]
    return Digits(
        pixels[:TRAINED_ON], labels[:TRAINED_ON], pixels[TRAINED_ON:], labels[TRAINED_ON:]
    )


def train(model: nn.Module, data: Digits, epochs: int, rate: float, seed: int, held: bool) -> None:
    """Train the model by AdamW, the rate falling to 0, its zeros held if it has some."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    if held:
        sc.hold(model, optimizer)
    steps = epochs * -(-len(data.pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.pixels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(model(data.pixels[batch]), data.labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def trained(sizes: Sizes, data: Digits, seed: int) -> Transformer:
    """A dense transformer, started and trained from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(sizes)
    train(model, data, sizes.epochs, LEARNING_RATE, seed, held=False)
    return model


@torch.no_grad()
def top1(model: nn.Module, data: Digits) -> float:
    """The share of the digits left out whose label scores highest."""
    return float((model(data.other_pixels).argmax(1) == data.other_labels).float().mean())


def recovered(
    dense: Transformer, pruned: Globs, data: Digits, sizes: Sizes, seed: int
) -> Iterator[tuple[str, Transformer]]:
    """The model with these layers 2:4, before recovery and after each kind of it."""
    model = copy.deepcopy(dense)
    prune(model, Configuration(pruned))
    yield NONE, model
    model = copy.deepcopy(dense)
    if pruned:
        plan = sc.plan(model, "2:4", layers=pruned)
        sc.reconstruct_(model, plan, sc.sparsegpt, list(data.pixels.split(BATCH)))
        yield RECONSTRUCT, copy.deepcopy(model)
    train(model, data, sizes.recovery_epochs, RECOVERY_RATE, seed, held=bool(pruned))
    if pruned:
        sc.check(model, plan)
    yield TRAIN, model


def case(sizes: Sizes, seed: int) -> Iterator[Row]:
    """A row for each configuration and each recovery that it has."""
    data = digits(seed)
    began = perf_counter()
    dense = trained(sizes, data, seed)
    seconds = perf_counter() - began
    different = dict.fromkeys(configuration.pruned for configuration in VISION.values())
    models = {pruned: list(recovered(dense, pruned, data, sizes, seed)) for pruned in different}
    for name, configuration in VISION.items():
        for recovery, model in models[configuration.pruned]:
            packed = copy.deepcopy(model)
            for globs, format in configuration.packed.items():
                sc.pack_(packed, format, named(packed, globs))
            yield {
                "configuration": name,
                "recovery": recovery,
                "seed": seed,
                "top1": f"{top1(packed, data):.4f}",
                "left_out": len(data.other_labels),
                "trained_s": f"{seconds:.1f}",
                "hidden": sizes.hidden,
                "layers": sizes.layers,
            }


def main(words: Sequence[str] | None = None) -> int:
    """Trains and measures, writes each seed's rows as they come; 2 without scikit-learn."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.vision",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tiny", action="store_true", help="a smoke test")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    if importlib.util.find_spec("sklearn") is None:
        print(ABSENT, file=sys.stderr)
        return 2
    path = None
    for seed in arguments.seeds:
        rows = list(case(TINY if arguments.tiny else Sizes(), seed))
        path = append(arguments.output, "vision", rows, "cpu")
        for row in rows:
            print(f"seed {seed}, {row['configuration']}, {row['recovery']}: top-1 {row['top1']}")
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
