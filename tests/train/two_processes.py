"""A process of several: trains with zeros held, sharded or each its own batches."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import secateur as sc
from secateur.train import (
    SoftThreshold,
    StraightThrough,
    Supermask,
    learn_masks_,
    rigl,
    sparse_evolution,
)


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


def moved(name: str, batches: list[int]) -> dict[str, list[torch.Tensor]]:
    """The masks after each of three moves and the weights, trained on the mean of some batches.

    Gradients are masked at each backward, which may be before they are averaged.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    plan = sc.plan(model, "unstructured:0.75@layer", layers=["0"])
    sc.prune_(model, plan, sc.criteria.random)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rule = {"rigl": rigl, "set": sparse_evolution}[name](plan, 100, every=2)
    held = sc.hold(model, optimizer, rule)
    held.mask_gradients_early()
    trained = DistributedDataParallel(model) if dist.is_initialized() else model
    found = []
    for step in range(6):
        for batch in batches:
            generator = torch.Generator().manual_seed(10 * step + batch)
            x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
            (trained(x).square().mean() / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            found.append(held.masks["0"])
    return {"masks": found, "weights": [p.detach() for p in model.parameters()]}


def learnt(name: str, batches: list[int]) -> dict[str, list[torch.Tensor]]:
    """The masks after each step and the weights, trained on the mean of some batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    rules = {"sr-ste": StraightThrough(0.01), "s-ste": SoftThreshold(), "supermask": Supermask()}
    trained = DistributedDataParallel(model) if dist.is_initialized() else model
    learning = learn_masks_(trained, sc.plan(model, "2:4", layers=["0"]), optimizer, rules[name])
    found = []
    for step in range(6):
        for batch in batches:
            generator = torch.Generator().manual_seed(10 * step + batch)
            x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
            (trained(x).square().mean() / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(learning.masks["0"])
    learning.release()
    return {"masks": found, "weights": [p.detach() for p in model.parameters()]}


def learn(rank: str, folder: str, name: str) -> None:
    in_two(rank, folder, lambda: learnt(name, [int(rank)]))


def move(rank: str, folder: str, name: str) -> None:
    in_two(rank, folder, lambda: moved(name, [int(rank)]))


def in_two(rank: str, folder: str, found: Callable[[], Any]) -> None:
    """Write what this process finds, one of two."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=2
    )
    torch.save(found(), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    rank, size, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group(
        "gloo", init_method=(path / "store").as_uri(), rank=rank, world_size=size
    )
    save(path / "checkpoint")
    dist.destroy_process_group()
