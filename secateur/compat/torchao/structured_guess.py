"""Example inputs for a model that was given none, by the layers that read its inputs."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import fake_tensor
from torch.nn.modules.conv import _ConvNd

from secateur.compat.torchao.structured_shrink import as_it_was
from secateur.compat.torchao.structured_trace import unlogged
from secateur.outputs import eval_mode

# Sides of images that are tried: those of the usual data sets, then every other one up to here, for
# a linear layer behind the convolutions may fit a single one.
USUAL, LARGEST = (32, 28, 64, 96, 128, 224), 256

# Tokens or steps in a guessed sequence, and samples in a guessed batch. They differ from each other
# and are primes, so that no channel is taken for one of them.
STEPS, SAMPLES = 5, 3

# What torch says of operations that need values, and so cannot be tried without them.
UNKNOWN = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
)


def guess_inputs(model: nn.Module) -> tuple[Tensor, ...]:
    """A batch that the model runs: a tensor for each input that has no default.

    Which layer reads an input, torch.fx says; sizes are tried on tensors without values, so that
    nothing is computed.

    Raises:
        ValueError: if no layer reads one of them, or the model runs none of the batches.
    """
    like = next(model.parameters(), torch.zeros(0))
    tried: list[Any] = []
    # A forward may keep what it computes, which are symbols here.
    with as_it_was(model, always=True):
        readers = _readers(model)
        for shapes in _candidates(readers):
            if _runs(model, shapes, readers, like):
                return _batch(readers, shapes, like)
            tried.append(shapes if len(shapes) > 1 else shapes[0])
    some = ", ".join(map(str, tried[: 2 * len(USUAL)])) + (", ..." if len(tried) > 12 else "")
    raise ValueError(
        f"prepare needs example_inputs for {type(model).__name__}, it runs none of "
        f"{some or 'those that could be guessed'}: give a batch, prepare(model, config, "
        "example_inputs=...)"
    )


# --- which layers ---------------------------------------------------------------------------------


def _readers(model: nn.Module) -> list[nn.Module]:
    """The layer that reads each of the model's inputs; nothing if one has none.

    Of a model that fx cannot trace, the first layer, if there is one input.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p.name for p in parameters if p.default is p.empty and p.kind in positional]
    if type(model).__module__.startswith("torch.nn.modules") and not isinstance(
        model, nn.Sequential
    ):
        found: Mapping[str, nn.Module | None] = {}
    else:
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
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
    """The first layer that this input reaches, through what has no sizes of its own."""
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


def _candidates(readers: Sequence[nn.Module]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """The shapes of batches to be tried, each once."""
    if not readers:
        return
    before: set[tuple[tuple[int, ...], ...]] = set()
    for side in (*USUAL, *(side for side in range(1, LARGEST + 1) if side not in USUAL)):
        for other in (False, True):
            shapes = tuple(_shape(layer, side, other=other) for layer in readers)
            if shapes not in before:
                before.add(shapes)
                yield shapes


def _shape(layer: nn.Module, side: int, *, other: bool) -> tuple[int, ...]:
    """What a layer reads; the `other` shape is of sequences for a linear layer, of one for RNNs."""
    if isinstance(layer, _ConvNd):
        return (SAMPLES, layer.in_channels, *[side] * len(layer.kernel_size))
    if isinstance(layer, nn.RNNBase):
        return (STEPS, layer.input_size) if other else (SAMPLES, STEPS, layer.input_size)
    if isinstance(layer, nn.Linear):
        width = layer.in_features
        return (SAMPLES, STEPS, width) if other else (SAMPLES, width)
    return (SAMPLES, STEPS)


def _batch(
    readers: Sequence[nn.Module], shapes: Sequence[tuple[int, ...]], like: Tensor
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)  # not the user's stream of random numbers
    return tuple(
        (torch.arange(SAMPLES * STEPS) % layer.num_embeddings).view(shape).to(like.device)
        if isinstance(layer, nn.Embedding)
        else torch.randn(shape, generator=generator).to(like)
        for layer, shape in zip(readers, shapes, strict=True)
    )


def _runs(
    model: nn.Module,
    shapes: Sequence[tuple[int, ...]],
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
