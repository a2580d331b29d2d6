"""Half-blocks: where the attention of a block ends and its MLP begins, found by running it.

A block is cut at a tensor through which everything before it reaches the output, such as the
residual stream between attention and MLP. Gradients tell: a tensor is a cut if the output's
gradient at the block's input is the same when it is taken through that tensor alone.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from secateur.model import layers as _layers
from secateur.model.blocks import Call, Enough, hooks, tensors_of
from secateur.model.replaced import with_weights

# Positional and keyword arguments of a block.
Arguments = tuple[Sequence[Any], Mapping[str, Any]]

# Relative. Both gradients come from the same operations; off a cut, a large part is missing.
CUT_TOLERANCE = 1e-3

# Layer-by-layer reconstruction has solved a single layer already.
FEWEST_LAYERS = 2


@dataclass(frozen=True)
class Cut:
    """Where a tensor enters: the module, the number of its call, the position of the argument."""

    module: str
    call: int
    leaf: int


@dataclass(frozen=True)
class HalfBlock:
    """Layers to be trained together, and the output that they should give for each batch.

    A block that cannot be cut, such as a residual block of two convolutions, counts as one half.
    """

    name: str
    layers: Mapping[str, nn.Module]
    targets: Sequence[Float[Tensor, "..."]]
    device: torch.device
    block: str
    end: Cut | None
    module: nn.Module
    arguments: Sequence[Sequence[Callable[[], Arguments]]]

    def output(self, batch: int, weights: Mapping[str, Tensor]) -> Float[Tensor, "batch ..."]:
        """The half-block's output for a batch with these weights; gradients reach only these."""
        return self.output_for(self.given(batch), weights)

    def given(self, batch: int) -> list[Arguments]:
        """What the block is called with for each part of a batch."""
        return [of_part() for of_part in self.arguments[batch]]

    def output_for(
        self, given: Sequence[Arguments], weights: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch ..."]:
        """The half-block's output where the block is called with these arguments."""
        replaced = with_weights(self.layers, weights)
        inside = {name[len(self.block) + 1 :]: tensor for name, tensor in replaced.items()}
        fixed = {name: p.detach() for name, p in self.module.named_parameters()}
        found: list[Tensor] = []
        for args, kwargs in given:
            run = partial(functional_call, self.module, fixed | inside, tuple(args), dict(kwargs))
            (output,), _ = outputs(self.module, [self.end], run)
            found.append(output)
        return _together(found)


class DenseStream:
    """The dense model's hidden states, carried along a chain of blocks beside the pruned ones."""

    def __init__(self, batch_of: Sequence[int], device: torch.device) -> None:
        self._batch_of = batch_of
        self._device = device
        self._previous: list[list[Tensor | None]] = [[] for _ in batch_of]

    def halves(
        self,
        name: str,
        block: nn.Module,
        layers: Mapping[str, nn.Module],
        calls: Sequence[Call],
        pruned: Sequence[Sequence[Tensor | None]],
        wanted: Sequence[set[int]],
    ) -> list[HalfBlock]:
        """The half-blocks of a block that is still dense; the stream then advances past it.

        `layers` are the planned ones in the order in which they run. For each part of a batch,
        `calls` has the block's call, `pruned` the previous block's output in the pruned model, and
        `wanted` what the next block uses; it is empty if no block follows.
        """
        inside = [layer[len(name) + 1 :] for layer in layers]
        groups: list[tuple[tuple[str, ...], Cut | None]] = []
        if layers:
            groups = find_cuts(block, inside, calls[0].arguments(self._previous[0], self._device))
        ends = [end for _, end in groups] or [None]
        targets: list[list[Tensor]] = [[] for _ in ends]
        for b, call in enumerate(calls):
            run = partial(call.replay, block, self._previous[b], self._device)
            found, returned = outputs(block, ends, run)
            kept_on = call.device(self._previous[b])
            for target, tensor in zip(targets, found, strict=True):
                target.append(tensor.to(kept_on))
            if wanted:
                self._previous[b] = call.kept(returned, wanted[b], self._previous[b])
        arguments = [
            partial(call.arguments, before, self._device)
            for call, before in zip(calls, pruned, strict=True)
        ]
        parts: dict[int, list[int]] = {}
        for part, batch in enumerate(self._batch_of):
            parts.setdefault(batch, []).append(part)
        full = dict(zip(inside, layers, strict=True))
        return [
            HalfBlock(
                f"{name} ({i} of {len(groups)})" if len(groups) > 1 else name,
                {full[layer]: layers[full[layer]] for layer in of_half},
                [_together([targets[i - 1][p] for p in of_batch]) for of_batch in parts.values()],
                self._device,
                name,
                end,
                block,
                [[arguments[p] for p in of_batch] for of_batch in parts.values()],
            )
            for i, (of_half, end) in enumerate(groups, 1)
        ]


def find_cuts(
    block: nn.Module, planned: Sequence[str], arguments: Arguments
) -> list[tuple[tuple[str, ...], Cut | None]]:
    """The planned layers in groups, in the order in which they run, each with the cut after it.

    None stands for the block's output. Names are relative to the block. Between a cut and the one
    before it, or the start, there are at least two prunable layers, one of them planned; no layer
    runs on both sides.

    Cost: one run of the block with gradients on this batch, and a backward pass for each tensor of
        the output's shape that enters a module between layers.
    """
    with torch.enable_grad():
        args, kwargs, x = _with_gradient(arguments)
        calls, output = _traced(block, args, kwargs) if x is not None else ([], None)
        if x is None or output is None or not output.requires_grad:
            return [(tuple(planned), None)]
        is_cut = _cut_test(x, output)
        groups: list[tuple[tuple[str, ...], Cut | None]] = []
        left, since = list(planned), set[str]()
        tried: set[int] = set()
        for i, (cut, tensor, run) in enumerate(calls):
            done = [name for name in left if name in since]
            later = set[str]().union(*(names for _, _, names in calls[i:]))
            possible = (
                len(since) >= FEWEST_LAYERS and 0 < len(done) < len(left) and not since & later
            )
            if possible and tensor is not None and id(tensor) not in tried:
                tried.add(id(tensor))
                if is_cut(tensor):
                    groups.append((tuple(done), cut))
                    left, since = [name for name in left if name not in since], set()
            since |= run
        return [*groups, (tuple(left), None)]


def outputs(
    block: nn.Module, cuts: Sequence[Cut | None], run: Callable[[], Any]
) -> tuple[list[Float[Tensor, "batch ..."]], list[Tensor]]:
    """The tensors at the cuts during one run, and the block's output if the run reached it."""
    returned: list[Tensor] = []
    found: dict[Cut | None, Tensor] = {}
    counts: dict[str, int] = {}

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        counts[name] = counts.get(name, 0) + 1
        for cut in cuts:
            if cut is not None and (cut.module, cut.call) == (name, counts[name]):
                found[cut] = pytree.tree_leaves((args, kwargs))[cut.leaf]
        if len(found) == len(cuts):
            raise Enough

    named = dict(block.named_modules())
    with hooks(
        named[name].register_forward_pre_hook(partial(before, name), with_kwargs=True)
        for name in {cut.module for cut in cuts if cut is not None}
    ):
        with contextlib.suppress(Enough):
            returned = tensors_of(run())
            found[None] = first_tensor(returned)
    if missing := [cut.module for cut in cuts if cut is not None and cut not in found]:
        raise ValueError(
            f"half-blocks need blocks that run alike on all batches, {missing[0]} did not run on "
            "one of them: reconstruct layer by layer"
        )
    return [found[cut] for cut in cuts], returned


def _together(parts: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "..."]:
    """The outputs for the parts of a batch as one tensor, by rows where there are several."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten(0, -2) for part in parts])


def first_tensor(tree: Any) -> Float[Tensor, "batch ..."]:
    """The first floating-point tensor: the hidden state, if a block returns more than that."""
    return next(_floats(tree))[1]


def _floats(tree: Any) -> Iterator[tuple[int, Tensor]]:
    leaves = enumerate(pytree.tree_leaves(tree))
    return ((i, x) for i, x in leaves if isinstance(x, Tensor) and x.is_floating_point())


def _with_gradient(arguments: Arguments) -> tuple[Any, Any, Tensor | None]:
    """The arguments with gradients for their first tensor, and that tensor; None if none exists."""
    leaves, spec = pytree.tree_flatten(arguments)
    i, first = next(_floats(leaves), (0, None))
    if first is None:
        return (*arguments, None)
    leaves[i] = x = first.detach().requires_grad_()
    return (*pytree.tree_unflatten(leaves, spec), x)


def _traced(
    block: nn.Module, args: Any, kwargs: Any
) -> tuple[list[tuple[Cut, Tensor | None, set[str]]], Tensor]:
    """Calls inside the block, each with the tensor that may be a cut, and the block's output.

    The tensor is None if no argument requires gradients; the last item names the layers that run in
    the call: the module itself, or the matrices in its own parameters.
    """
    inner = {name: m for name, m in block.named_modules() if name}
    run = {name: _run_by(name, module) for name, module in inner.items()}
    calls: list[tuple[Cut, Tensor | None, set[str]]] = []
    counts: dict[str, int] = {}

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        counts[name] = counts.get(name, 0) + 1
        reached = ((i, t) for i, t in _floats((args, kwargs)) if t.requires_grad)
        leaf, tensor = next(reached, (0, None))
        calls.append((Cut(name, counts[name], leaf), tensor, run[name]))

    fixed = {name: p.detach() for name, p in block.named_parameters()}
    with hooks(
        m.register_forward_pre_hook(partial(before, name), with_kwargs=True)
        for name, m in inner.items()
    ):
        output = first_tensor(functional_call(block, fixed, tuple(args), dict(kwargs)))
    return calls, output


def _run_by(name: str, module: nn.Module) -> set[str]:
    """The layers that a call of the module runs, apart from those in modules that it calls."""
    if _layers.is_prunable(module):
        return {name}
    return {f"{name}.{inner}" for inner in _layers.pieces_of(module)}


def _cut_test(x: Tensor, output: Tensor) -> Callable[[Tensor], bool]:
    """A test of whether all of the output's gradient at `x` comes through a tensor."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(
        output.shape, generator=generator, dtype=torch.float32, device="cpu"
    ).to(output)

    def gradient(of: Tensor, at: Tensor, along: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(of, at, along, retain_graph=True, materialize_grads=True)
        return found.float() if at is x else found

    whole = gradient(output, x, direction)

    def is_cut(tensor: Tensor) -> bool:
        """Whether it does at every token: at x = 0 a norm's huge gradient would hide the others."""
        if tensor.shape != output.shape or tensor is x:
            return False
        through = gradient(tensor, x, gradient(output, tensor, direction))
        return bool(((through - whole).norm(dim=-1) <= CUT_TOLERANCE * whole.norm(dim=-1)).all())

    return is_cut
