"""Whole blocks: how much each changes what passes through it, and a chain without some of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from secateur.core.float64 import in_float64
from secateur.model.blocks import Batch, find_chains, hooks, input_of, tensors_of
from secateur.model.layers import layers_of
from secateur.model.outputs import answer, eval_mode


def chain_of(model: nn.Module) -> tuple[str, dict[str, nn.Module]]:
    """The chain of blocks with the most parameters, by its name: a decoder's layers.

    Raises:
        ValueError: if the model has none.
    """
    chains = find_chains(model, layers_of(model))
    if not chains:
        raise ValueError(
            f"this {type(model).__name__} has no list of equal blocks: leave blocks at 0"
        )
    return max(
        chains.items(),
        key=lambda item: sum(p.numel() for m in item[1].values() for p in m.parameters()),
    )


@torch.no_grad()
def influence(
    model: nn.Module, blocks: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> dict[str, float]:
    """1 - the mean cosine between what enters a block and what leaves it, over all positions.

    Cost: a run of the model on the batches.
    Raises:
        ValueError: if a block returns another shape than it takes, or does not run.
    Source: block influence, ShortGPT, Men et al. 2024, arXiv:2403.03853, eq. 1.
    """
    sums = dict.fromkeys(blocks, 0.0)
    counts, misfits = dict.fromkeys(blocks, 0), list[str]()

    def add(name: str, args: Any, kwargs: Any, output: Any) -> None:
        x, y = input_of(args, kwargs), tensors_of(output)[0]
        if x.shape != y.shape:
            misfits.append(f"{name} makes {list(y.shape)} of {list(x.shape)}")
            return
        cosine = nn.functional.cosine_similarity(in_float64(x), in_float64(y), dim=-1)
        sums[name] += float(cosine.sum())
        counts[name] += cosine.numel()

    def hook(name: str, block: nn.Module) -> Any:
        return block.register_forward_hook(
            lambda _, args, kwargs, output: add(name, args, kwargs, output), with_kwargs=True
        )

    with eval_mode(model), hooks(hook(name, block) for name, block in blocks.items()):
        for i, batch in enumerate(batches):
            answer(model, batch, f"batch {i}")
    if misfits:
        raise ValueError(f"{misfits[0]}, so that the model needs it: leave blocks at 0")
    if idle := [name for name, count in counts.items() if not count]:
        raise ValueError(f"{idle[0]} did not run on any batch: give batches that reach it")
    return {name: 1 - sums[name] / counts[name] for name in blocks}


def drop_blocks_(model: nn.Module, chain: str, gone: Sequence[int]) -> None:
    """Take blocks out of the chain; those behind them move up."""
    parent = model.get_submodule(chain)
    left = [block for i, block in enumerate(parent.children()) if i not in set(gone)]
    parent._modules.clear()
    parent._modules.update({str(i): block for i, block in enumerate(left)})
