"""Chains of blocks: found in the module tree, recorded in one pass, replayed block by block.

A chain is a list of modules of one type, each of which passes its output straight to the next, such
as the decoder layers of a language model. Calls are recorded with all the arguments that the model
gives (masks, position embeddings, keywords), except what comes from the previous block: a replay
fills that in, so that it passes on what the blocks, changed meanwhile, return.
"""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.core.interrupts import held, putting_back
from secateur.core.progress import progress

# The arguments of one call of the model: one tensor, positional arguments, or keywords.
Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def run_batch(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch: a tensor, positional arguments or keywords."""
    args, kwargs = arguments_of(model, batch)
    return model(*args, **kwargs)


def arguments_of(model: nn.Module, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that a batch stands for.

    Labels are left out if the model takes only the one input beside them.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return tuple(batch[:1] if has_labels_beside(model, batch) else batch), {}


def has_labels_beside(model: nn.Module, batch: Batch) -> bool:
    """Whether a batch is (inputs, labels), as data sets give it, and forward takes no labels.

    That is two tensors of one length where the forward takes one argument; or where it can do
    without a second one, whose name is not that of labels, and the second tensor is one integer a
    row. Losses read the labels, the model does not.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return False
    inputs, labels = batch
    if not all(isinstance(x, Tensor) and x.dim() > 0 for x in (inputs, labels)):
        return False
    if len(inputs) != len(labels) or not _takes(model, inputs):
        return False
    if not _takes(model, inputs, labels):
        return True
    second = list(inspect.signature(model.forward).parameters.values())[1:2]
    named = any(p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in LABELS for p in second)
    return named and labels.dim() == 1 and labels.dtype in INTEGERS


def _takes(model: nn.Module, *arguments: Any) -> bool:
    try:
        inspect.signature(model.forward).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return True


def require_batch(batch: Any, where: str) -> None:
    """Raise unless a model can be asked to run this batch.

    Raises:
        ValueError: if it is no batch, or holds tensors without values.
    """
    if not isinstance(batch, (Tensor, tuple, list, Mapping)):
        raise ValueError(f"{where} is {_one(batch)}: {_BATCH}")
    if any(
        tensor.is_meta
        for tensor in tensors_of(dict(batch) if isinstance(batch, Mapping) else batch)
    ):
        raise ValueError(
            f"{where}, {described(batch)}, is on the meta device, which holds no values: give "
            "batches of real data"
        )


def require_iterable(batches: object, verb: str) -> None:
    """Raise unless what the verb was given is an iterable of batches.

    Raises:
        ValueError: if it is one batch alone, or cannot be iterated over.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise ValueError(
            f"{verb} needs an iterable of batches, got one {type(batches).__name__}: wrap it in a "
            "list, or split it, as in tokens.split(8)"
        )
    if not isinstance(batches, Iterable):
        kind = "none" if batches is None else type(batches).__name__
        raise ValueError(f"{verb} needs an iterable of batches, got {kind}: pass a list of them")


def why_not(model: nn.Module, batch: Batch, where: str, error: Exception) -> str:
    """One line that says why the model cannot run a batch, and what can be done."""
    reason = " ".join(str(error).split()).rstrip(".")
    remedy = _BATCH
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters.values()
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        other = [] if anything else [k for k in batch if k not in {p.name for p in parameters}]
        raw = [key for key, x in batch.items() if isinstance(x, (str, list))]
        if other:
            remedy = f"leave out {', '.join(map(repr, other))}, which its forward does not take"
        elif raw:
            remedy = f"{raw[0]!r} is {_one(batch[raw[0]])}: make it a tensor, or leave it out"
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        remedy += "; if what follows the first are labels, give batches without them"
    return f"{type(model).__name__} cannot run {where}, {described(batch)}: {reason}: {remedy}"


# What a second argument of forward is called that labels are for.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LABELS = ("labels", "label", "targets", "target", "y")

_BATCH = "a batch is a tensor, a tuple of positional or a dict of keyword arguments"


def described(batch: Batch) -> str:
    """The batch's types and shapes."""
    if isinstance(batch, Tensor):
        return _one(batch)
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {_one(x)}" for key, x in batch.items()) + "}"
    return "(" + ", ".join(map(_one, batch)) + ")"


def _one(x: Any) -> str:
    return f"{type(x).__name__} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer that was called as `layer(x)` or `layer(input=x)`."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def as_batch(batch: Any, where: str) -> Batch:
    """The batch, with inference-mode tensors copied so that autograd can save them.

    Raises:
        ValueError: as `require_batch`.
    """
    require_batch(batch, where)
    plain: Batch = dict(batch) if isinstance(batch, Mapping) else batch
    if not any(tensor.is_inference() for tensor in tensors_of(plain)):
        return plain
    copied: Batch = pytree.tree_map_only(Tensor, torch.clone, plain)
    return copied


def find_chains(
    model: nn.Module, layers: Mapping[str, nn.Module]
) -> dict[str, dict[str, nn.Module]]:
    """Each chain's blocks by name: outermost lists of several modules of one type with layers."""
    chains: dict[str, dict[str, nn.Module]] = {}
    for prefix, module in model.named_modules():
        inside = any(prefix.startswith(outer + ".") for outer in chains)
        if inside or not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        one_type = len({type(block) for block in module.children()}) == 1
        if prefix and one_type and any(name.startswith(prefix + ".") for name in layers):
            chains[prefix] = {f"{prefix}.{key}": child for key, child in module.named_children()}
    return chains


@dataclass(frozen=True)
class FromPrevious:
    """A placeholder in a recorded call for the previous block's output tensor of this index."""

    index: int


@dataclass(frozen=True)
class Call:
    """A block's recorded arguments, flattened, with placeholders for the last block's output."""

    leaves: list[Any]
    spec: pytree.TreeSpec

    def replay(
        self, block: nn.Module, previous: Sequence[Tensor | None], device: torch.device
    ) -> list[Tensor]:
        """The tensors that the block returns."""
        args, kwargs = self.arguments(previous, device)
        return tensors_of(block(*args, **kwargs))

    def arguments(self, previous: Sequence[Tensor | None], device: torch.device) -> Any:
        """Positional and keyword arguments, with the previous block's output filled in."""
        leaves = [previous[x.index] if isinstance(x, FromPrevious) else x for x in self.leaves]
        return pytree.tree_unflatten(to_device(leaves, device), self.spec)

    def kept(
        self, output: Sequence[Tensor], wanted: set[int], previous: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """This block's output, on the inputs' device; None for tensors that the next leaves out."""
        device = self.device(previous)
        return [t.to(device) if i in wanted else None for i, t in enumerate(output)]

    def device(self, previous: Sequence[Tensor | None]) -> torch.device:
        """The device on which the inputs of this call are kept."""
        return next(x.device for x in [*self.leaves, *previous] if isinstance(x, Tensor))

    @property
    def wanted(self) -> set[int]:
        """The indices of the previous block's output tensors that this call uses."""
        return {x.index for x in self.leaves if isinstance(x, FromPrevious)}


class NotAChain(Exception):
    """A module of the list does not pass its output straight to the next one."""


class Enough(Exception):
    """Stops a forward pass once everything wanted of it has been seen."""


def record_all(
    model: nn.Module,
    chain: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    offload: bool,
    stand_in: bool = False,
) -> list[list[Call]] | None:
    """Every block's call for every batch; None if replaying them does not give the same output.

    With `stand_in`, the blocks run for the first batch only; after that zeros of the same shapes
    stand in for their outputs. None also if the stand-ins change the calls for the first batch.
    """
    blocks = list(chain.values())
    try:
        calls, output = _record(model, blocks, batches[0])
        device = output[0].device
        previous: Sequence[Tensor] = []
        for block, call in zip(blocks, calls, strict=True):
            previous = call.replay(block, previous, device)
        if not _same(previous, output):
            return None
        del previous, output
        with _standing_in(blocks, calls[0], device) if stand_in else contextlib.nullcontext():
            if stand_in and not _same_calls(calls, _record(model, blocks, batches[0])[0]):
                return None
            recorded = [_offloaded(calls) if offload else calls]
            for batch in progress(batches[1:], "recording", within=True):
                calls, _ = _record(model, blocks, batch)
                recorded.append(_offloaded(calls) if offload else calls)
    except NotAChain:
        return None
    return recorded


def _record(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Batch
) -> tuple[list[Call], list[Tensor]]:
    """One call of each block in this forward pass, and what the last block returned."""
    calls: list[Call] = []
    outputs: list[list[Tensor]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(calls) == len(blocks) or module is not blocks[len(calls)]:
            raise NotAChain
        leaves, spec = pytree.tree_flatten((args, kwargs))
        previous = {id(t): i for i, t in enumerate(outputs[-1])} if outputs else {}
        earlier = {id(t) for output in outputs[:-1] for t in output} - previous.keys()
        call = Call(
            [FromPrevious(previous[id(x)]) if id(x) in previous else x for x in leaves], spec
        )
        if any(id(x) in earlier for x in leaves) or (outputs and not call.wanted):
            raise NotAChain
        calls.append(call)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(tensors_of(output))
        if len(outputs) == len(blocks):
            raise Enough

    entering = (b.register_forward_pre_hook(before, with_kwargs=True) for b in blocks)
    leaving = (b.register_forward_hook(after) for b in blocks)
    with hooks(itertools.chain(entering, leaving)):
        try:
            run_batch(model, batch)
        except Enough:
            return calls, outputs[-1]
    raise NotAChain


@contextlib.contextmanager
def _standing_in(blocks: Sequence[nn.Module], call: Call, device: torch.device) -> Iterator[None]:
    """Let blocks return zeros, in the shape of their first tensor argument, instead of running.

    Everything but the tensors of their output is what the first block returns for this call.
    """
    args, kwargs = call.arguments([], device)
    shape = tensors_of((args, kwargs))[0].shape
    leaves, spec = pytree.tree_flatten(blocks[0](*args, **kwargs))
    if any(isinstance(x, Tensor) and x.shape != shape for x in leaves):
        raise NotAChain

    def run(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        x = tensors_of((args, kwargs))[0]
        return pytree.tree_unflatten(
            [torch.zeros_like(x) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        )

    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(forward_as(block, run))
        yield


def _same_calls(calls: Sequence[Call], others: Sequence[Call]) -> bool:
    """Whether both pass the same values, and blocks' outputs in the same positions."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return torch.equal(a, b)
        return type(a) is type(b) and bool(a == b)

    return all(
        one.spec == two.spec and all(map(same, one.leaves, two.leaves))
        for one, two in zip(calls, others, strict=True)
    )


@contextlib.contextmanager
def forward_as(module: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Make the module run `run(forward, args, kwargs)` for its `forward`; its hooks still run."""
    own, forward = vars(module), module.forward
    with putting_back() as stack:
        if "forward" in own:
            stack.callback(own.__setitem__, "forward", forward)
        else:
            stack.callback(own.pop, "forward", None)
        own["forward"] = lambda *args, **kwargs: run(forward, args, kwargs)
        yield


@contextlib.contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    """Register hooks by exhausting `handles`, and remove them at the end.

    An interrupt may come between one and the next: pass a generator that registers them, not a
    list.
    """
    registered: list[Any] = []
    with putting_back() as stack:
        stack.callback(list, map(methodcaller("remove"), registered))  # lazy: once they are listed
        with held():
            registered.extend(handles)
        yield


def to_device(tree: Any, device: torch.device) -> Any:
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)


def _offloaded(calls: list[Call]) -> list[Call]:
    """The calls with their tensors on the CPU; a tensor that blocks share is moved once."""
    tensors = {id(x): x for call in calls for x in call.leaves if isinstance(x, Tensor)}
    moved = {key: x.to("cpu") for key, x in tensors.items()}
    return [Call([moved.get(id(x), x) for x in call.leaves], call.spec) for call in calls]


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in whatever a module returned, in order."""
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether both are equal up to the differences of non-deterministic kernels."""
    return len(a) == len(b) and all(
        x.shape == y.shape and bool((x.float() - y.float()).norm() <= 1e-3 * y.float().norm())
        for x, y in zip(a, b, strict=True)
    )
