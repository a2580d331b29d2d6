"""A 2:4 layer's packed step in DDP, run by `test_training.py` in two processes and in one."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from secateur.formats import training
from secateur.formats.training import TrainingLinear
from secateur.patterns import NM

TOKENS = 32  # of each process


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).bfloat16()
    for layer in (layers[0], layers[2]):
        layer.weight.data.mul_(NM(2, 4).mask(layer.weight.data.abs()))
        TrainingLinear.become(layer, TOKENS)
    return layers


def gradients(parts: list[int]) -> list[Tensor]:
    """The gradients of the mean over these parts of the tokens, and over the processes."""
    training.why_not = lambda *_: None  # as on a GPU: units, multiplied by the reference
    layers = model()
    run: nn.Module = DistributedDataParallel(layers) if dist.is_initialized() else layers
    x = torch.randn(2, TOKENS, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    run(x[parts].flatten(0, 1)).float().square().mean().backward()
    return [parameter.grad for parameter in layers.parameters() if parameter.grad is not None]


def one_of_two(rank: str, folder: str) -> None:
    """Write the gradients that this process has."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=2)
    torch.save(gradients([int(rank)]), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
