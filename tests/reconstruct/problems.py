"""Weights, Gram matrices and small models that the tests of several algorithms share."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.patterns import Pattern

# A pattern, and the same zeros in the notation of the papers' algorithms.
PAPER_PATTERNS: list[tuple[Pattern, dict[str, float]]] = [
    (sc.NM(2, 4), {"n": 2, "m": 4}),
    (sc.NM(4, 8), {"n": 4, "m": 8}),
    (sc.NM(1, 4), {"n": 1, "m": 4}),
    (sc.Unstructured(0.5, "layer"), {"p": 0.5}),
    (sc.Unstructured(0.75, "layer"), {"p": 0.75}),
]


def problem(rows: int = 24, columns: int = 320, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    mix *= torch.arange(1, columns + 1).pow(-0.5)[:, None]
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def output_error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    """tr (W - W') G (W - W')^T in float64."""
    difference = (weight - other).double()
    return float(((difference @ gram.double()) * difference).sum())


def gpt2_and_batches(blocks: int) -> tuple[nn.Module, list[Tensor]]:
    """A GPT-2 with this number of blocks and transposed weights, and four batches of tokens."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": blocks, "n_head": 2, "vocab_size": 20}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=16, **sizes)).eval()
    return model, list(torch.randint(20, (4, 2, 9), generator=torch.Generator().manual_seed(0)))


def model_and_batches() -> tuple[nn.Module, list[Tensor]]:
    """Two linear layers, and four batches of 200 correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 24))
    mix = torch.randn(16, 64, generator=generator)
    noise = torch.randn(800, 64, generator=generator)
    return model, list((torch.randn(800, 16, generator=generator) @ mix + 0.2 * noise).split(200))
