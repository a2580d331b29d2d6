"""A process of several: trains a sharded model with zeros held, saves it, or resumes from that."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import secateur as sc


def sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 3))  # 3 rows: uneven shards
    sc.prune_(model, "unstructured:0.5@layer")
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    return model


def begun(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, sc.hold(model, optimizer)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, held: Any, steps: int) -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(x).square().mean().backward()
        held.mask_gradients_()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()


def save(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    model = sharded()
    optimizer, held = begun(model)
    train(model, optimizer, held, 3)
    dcp.save({"model": model.state_dict(), "held": held}, checkpoint_id=folder)


if __name__ == "__main__":
    rank, size, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group(
        "gloo", init_method=(path / "store").as_uri(), rank=rank, world_size=size
    )
    save(path / "checkpoint")
    dist.destroy_process_group()
