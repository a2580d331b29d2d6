"""A small vision transformer on scikit-learn's 8 x 8 digits, trained on the spot."""

import argparse
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur as sc
from bench.lib.command import parser_of

SIDE, PATCH = 8, 2  # pixels
CLASSES = 10
LARGEST = 16.0  # of a pixel
TRAINED_ON = 1200  # of 1797 digits; the others are left out
BATCH = 64
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Sizes:
    """Of the transformer, and how many epochs it is trained for, and trained on when pruned."""

    hidden: int = 32
    layers: int = 4
    heads: int = 4
    epochs: int = 40
    recovery_epochs: int = 10


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
    masks = sc.hold(model, optimizer) if held else None
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
    if masks is not None:
        masks.release()
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


def digits_parser(bench: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a bench on digits: which seeds, and whether it is a smoke test."""
    parser = parser_of(bench, description)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tiny", action="store_true", help="a smoke test")
    return parser


def why_no_digits(bench: str) -> str | None:
    """What has to be installed first, or None."""
    if importlib.util.find_spec("sklearn") is None:
        return f"bench.run.{bench} needs scikit-learn for its digits: pip install scikit-learn"
    return None
