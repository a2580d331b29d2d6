"""Example inputs for a model that was given none, guessed from the layers that read its inputs."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import fake_tensor
from torch.nn.modules.conv import _ConvNd

from secateur.model.outputs import eval_mode
from secateur.prune.channels.restore import remembered
from secateur.prune.channels.trace import unlogged

# Image sides to try: those of the usual data sets, then every other up to the largest, because a
# linear layer behind the convolutions may fit only one.
USUAL, LARGEST = (32, 28, 64, 96, 128, 224), 256

# Tokens or steps in a guessed sequence, and samples in a guessed batch: different primes, so that
# neither is mistaken for a number of channels.
STEPS, SAMPLES = 5, 3

Shape = tuple[int, ...]

# What torch raises for operations that depend on values, which fake tensors do not have.
UNKNOWN = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
)


def guess_inputs(model: nn.Module) -> tuple[Tensor, ...]:
    """A batch that the model runs: a tensor for each input without a default, at least one.

    torch.fx tells which layer reads an input. Sizes are tried on tensors without values, so nothing
    is computed.

    Raises:
        ValueError: if no layer reads one of the inputs, or the model runs none of the batches.
    """
    default = torch.empty(0, dtype=torch.get_default_dtype(), device=torch.get_default_device())
    like = next(model.parameters(), default)
    tried: list[Any] = []
    put_back = remembered(model)  # a forward may keep what it computes: fake tensors, here
    try:
        readers = _readers(model)
        for shapes in _candidates(readers):
            if _runs(model, shapes, readers, like):
                return _batch(readers, shapes, like)
            tried.append(shapes if len(shapes) > 1 else shapes[0])
    finally:
        put_back()
    some = ", ".join(map(str, tried[: 2 * len(USUAL)])) + (", ..." if len(tried) > 12 else "")
    raise ValueError(
        f"{type(model).__name__} needs example inputs, it runs none of "
        f"{some or 'those that could be guessed'}: give a batch that it takes"
    )


# --- which layers ---------------------------------------------------------------------------------


def _readers(model: nn.Module) -> list[nn.Module]:
    """The layer that reads each of the model's inputs; empty if an input has none.

    For a model that fx cannot trace it is the first layer, provided that there is only one input.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in positional]
    required = [p.name for p in parameters if p.default is p.empty and p.name in names]
    required = required or names[:1] or ["input"]  # transformers' models require none
    if type(model).__module__.startswith("torch.nn.modules") and not isinstance(
        model, nn.Sequential
    ):
        found: Mapping[str, nn.Module | None] = {}
    else:
        optional = [p for p in parameters if p.default is not p.empty and p.name not in required]
        defaults = {p.name: p.default for p in optional}
        try:
            graph = fx.Tracer().trace(model, defaults)
        except Exception:  # whatever the forward raises on symbols
            found = {}
        else:
            found = {
                str(node.target): _reader(model, graph, node)
                for node in graph.nodes
                if node.op == "placeholder"
            }
    layers = [found.get(name) for name in required]
    if len(required) == 1 and layers[0] is None:
        layers = [_first(model)]
    return [layer for layer in layers if layer is not None] if None not in layers else []


def _reader(model: nn.Module, graph: fx.Graph, source: fx.Node) -> nn.Module | None:
    """The first layer that this input reaches through operations without sizes of their own."""
    reached = {source}
    for node in graph.nodes:
        if not reached & set(node.all_input_nodes) or node.target in (getattr, "size", "dim"):
            continue
        if node.op == "call_module" and (layer := _first(model.get_submodule(str(node.target)))):
            return layer
        reached.add(node)
    return None


def _first(module: nn.Module) -> nn.Module | None:
    known = (nn.Linear, nn.RNNBase, nn.Embedding, _ConvNd)
    return next((layer for layer in module.modules() if isinstance(layer, known)), None)


# --- which shapes ---------------------------------------------------------------------------------


def _candidates(readers: Sequence[nn.Module]) -> Iterator[tuple[Shape, ...]]:
    """The shapes of batches to try, without repetition."""
    before: set[tuple[Shape, ...]] = set()
    for side in (*USUAL, *(side for side in range(1, LARGEST + 1) if side not in USUAL)):
        options = [_shapes(layer, side) for layer in readers]
        for i in range(max(map(len, options), default=0)):
            shapes = tuple(own[min(i, len(own) - 1)] for own in options)
            if shapes not in before:
                before.add(shapes)
                yield shapes


def _shapes(layer: nn.Module, side: int) -> list[Shape]:
    """The shapes that a layer reads, the usual one first, then those a forward may convert."""
    if isinstance(layer, _ConvNd):
        sides = [side] * len(layer.kernel_size)
        shapes: list[Shape] = [(SAMPLES, layer.in_channels, *sides)]
        shapes.append((SAMPLES, *sides, layer.in_channels))
        return shapes + ([(SAMPLES, *sides)] if layer.in_channels == 1 else [])
    if isinstance(layer, nn.RNNBase):
        return [(SAMPLES, STEPS, layer.input_size), (STEPS, layer.input_size)]
    if isinstance(layer, nn.Linear):
        return [(SAMPLES, layer.in_features), (SAMPLES, STEPS, layer.in_features)]
    return [(SAMPLES, STEPS), (SAMPLES,)]


def _batch(
    readers: Sequence[nn.Module], shapes: Sequence[Shape], like: Tensor
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)  # not the user's stream of random numbers
    return tuple(
        (torch.arange(math.prod(shape), device=like.device) % layer.num_embeddings).view(shape)
        if isinstance(layer, nn.Embedding)
        else torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(like)
        for layer, shape in zip(readers, shapes, strict=True)
    )


def _runs(
    model: nn.Module,
    shapes: Sequence[Shape],
    readers: Sequence[nn.Module],
    like: Tensor,
) -> bool:
    """Whether the model takes tensors of these shapes, as far as can be told without values."""
    with (
        eval_mode(model),
        torch.no_grad(),
        unlogged(),
        fake_tensor.FakeTensorMode(allow_non_fake_inputs=True),
    ):
        dtypes = [torch.long if isinstance(r, nn.Embedding) else like.dtype for r in readers]
        batch = [
            torch.empty(shape, dtype=dtype, device=like.device)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        try:
            model(*batch)
        except UNKNOWN:
            return True
        except Exception:  # whatever the forward raises on sizes
            return False
    return True
