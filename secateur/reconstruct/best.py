"""The presets, and what they take, told before they start."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from secateur import layers as _layers
from secateur.calibrate import observe
from secateur.halves import first_tensor
from secateur.layers import weight_of
from secateur.outputs import answer, eval_mode
from secateur.reconstruct.alps import alps
from secateur.reconstruct.block import Blockwise, blockwise
from secateur.reconstruct.refit import CHOOSING, DAMPINGS
from secateur.replay import Batch, find_chains, hooks, tensors_of

best = blockwise(alps)
"""`sc.blockwise(sc.alps)` by its short name: what loses least without retraining.

`sc.reconstruct_(model, plan, sc.best, batches)`. Before it starts, a line on stderr says about how
long it takes and how much memory: `secateur.reconstruct.estimate`. Where that is too much,
`sc.alps` alone is the next best.
"""

thorough = blockwise(alps, distil=4)
"""`sc.best`, and then the kept weights of the whole model trained together: what loses least.

`sc.reconstruct_(model, plan, sc.thorough, batches)`, for models of which the device holds two in
float32 and three times the planned weights. It says before it starts what it takes, as `sc.best`
does.
"""

# What is usual; ADMM stops by itself, at 300 at most, and conjugate gradients by their tolerance.
ADMM_ITERATIONS = 100
REFIT_STEPS = 50

# Matrices in float32 that are alive at once while a layer is solved, counted in `alps`.
SQUARES, WEIGHTS = 9, 14
SUMS = 4  # of the squares: both Gram matrices and their sums, which outlive the solution
# While a half-block is trained: weights, the best so far, gradients, two moments, two temporaries.
TRAINED = 7
HIDDEN_STATES = 4  # two streams and the targets of two halves
# While the whole model is trained, in float32: gradients and two moments of what is planned, and a
# temporary; the outputs' logarithms and gradients, of both models.
DISTILLED, OUTPUTS = 4, 8

# Sizes at which products and eigenvectors run as for real layers, for a fraction of a second.
PROBE = {"cpu": (1024, 384), "cuda": (4096, 1024)}


@dataclass(frozen=True)
class Estimate:
    """About how long a preset takes, and the bytes on the device beside the model at its peak."""

    seconds: float
    bytes: int
    device: str

    def __str__(self) -> str:
        hours, minutes = divmod(round(self.seconds / 60), 60)
        duration = f"{hours} h {minutes} min" if hours else f"{minutes} min"
        if self.seconds < 60:
            duration = f"{self.seconds:.0f} s"
        memory = f"{self.bytes / 1e9:.1f} GB" if self.bytes >= 1e8 else f"{self.bytes / 1e6:.1f} MB"
        return f"about {duration} on {self.device}, and {memory} of memory beside the model"


@dataclass(frozen=True)
class Stage:
    """Layers of a block that share an input: their shapes, and how many tokens reach them."""

    block: str
    shapes: tuple[tuple[int, int], ...]  # [out, in]
    tokens: int

    @property
    def inputs(self) -> int:
        return self.shapes[0][1]

    @property
    def outputs(self) -> int:
        return sum(out for out, _ in self.shapes)


def estimate(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    method: Blockwise = best,
    *,
    offload: bool = False,
) -> Estimate:
    """What `best`, or `thorough`, will take for these layers; nothing is changed.

    The first batch says how many tokens each layer sees, which layers share an input and how large
    the hidden states are; other batches count by their size. Operations are `operations`, over the
    rate of one product of two matrices here and now, in float32 and in the model's dtype; the time
    of eigenvectors, which is far from that rate, is measured and grows with the cube. What is
    no product of a planned layer (attention, norms, Python) is not in it, so that small models take
    longer. Bytes are `peak_bytes` and `distilling_bytes`, which are counted, not measured.

    Cost: the first batch through the model about nine times, and a fraction of a second.
    Raises:
        ValueError: as `reconstruct_`, if the model cannot run the first batch.
    """
    weight = weight_of(next(iter(layers.values())))
    times = sum(map(_size, batches)) / _size(batches[0])
    stages, hidden = _first_batch(model, layers, batches[0])
    every = [Stage(s.block, s.shapes, round(s.tokens * times)) for s in stages]
    forwards, solving, cubes = operations(every, method.epochs)
    distilling = 4 * method.distil * sum(map(_forward, every))  # the dense model's forward is one
    size, cube = PROBE["cuda" if weight.is_cuda else "cpu"]
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(size, size, device=weight.device, generator=generator, dtype=torch.float32)
    y = x.to(weight.dtype)
    z = x[:cube, :cube] @ x[:cube, :cube].T
    rate, own_rate = (2 * size**3 / _seconds(partial(torch.mm, m, m)) for m in (x, y))
    eigenvectors = _seconds(partial(torch.linalg.eigh, z)) / cube**3
    bytes = peak_bytes(stages, 0 if offload else round(hidden * times), weight.itemsize)
    if method.distil:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        outputs = _outputs(model, batches[0])
        at_the_end = distilling_bytes(stages, parameters, outputs, weight.itemsize)
        bytes = max(bytes + parameters * weight.itemsize, at_the_end)
    return Estimate(
        forwards / own_rate + (solving + distilling) / rate + cubes * eigenvectors,
        bytes,
        str(weight.device),
    )


def operations(stages: Sequence[Stage], epochs: int) -> tuple[float, float, float]:
    """Operations of the blocks' forwards and backwards, of solving, and the sum of in^3.

    A forward of a block is F = 2 tokens out in, summed over its layers. It runs to be recorded, for
    the dense stream, to pass on, and once for each distinct input; in training an epoch takes 3 F
    for forward and backward, and at most F for what is before a half in its block.
    A Gram matrix takes 2 tokens in^2, a layer 2 out in^2 for each product: two in an iteration of
    ADMM, one in a step of the refit, with few outputs where the damping is chosen.
    """
    forwards = solving = cubes = 0.0
    for block in {stage.block for stage in stages}:
        inside = [stage for stage in stages if stage.block == block]
        once = sum(map(_forward, inside))
        forwards += once * (3 + len(inside) + 4 * epochs)
    for stage in stages:
        cubes += float(stage.inputs) ** 3
        solving += 2.0 * stage.tokens * stage.inputs**2
        for out, columns in stage.shapes:
            rows = out * (2 * ADMM_ITERATIONS + REFIT_STEPS)
            rows += min(out, CHOOSING) * len(DAMPINGS) * REFIT_STEPS
            solving += 2.0 * rows * columns**2
    return forwards, solving, cubes


def peak_bytes(stages: Sequence[Stage], hidden: int, itemsize: int) -> int:
    """The bytes beside the model at the peak, for the `hidden` bytes of all hidden states.

    Four copies of the hidden states, and the larger of what solving a layer takes,
    4 (9 in^2 + 14 out in), and what training the layers of a block together takes: 28 bytes a
    weight, and what is kept of a batch for the backward, tokens (in + 2 out) numbers for each layer
    and what follows it, beside the Gram matrices of a layer, 16 in^2. `stages` are those of one
    batch.
    """
    widest = max(stage.inputs for stage in stages)
    solving = max(
        4 * (SQUARES * columns**2 + WEIGHTS * out * columns)
        for stage in stages
        for out, columns in stage.shapes
    )
    training = 0
    for block in {stage.block for stage in stages}:
        inside = [stage for stage in stages if stage.block == block]
        weights = sum(s.outputs * s.inputs for s in inside)
        kept = sum(s.tokens * (s.inputs + 2 * s.outputs) for s in inside)
        training = max(training, 4 * TRAINED * weights + itemsize * kept)
    return HIDDEN_STATES * hidden + max(solving, 4 * SUMS * widest**2 + training)


def distilling_bytes(stages: Sequence[Stage], parameters: int, outputs: int, itemsize: int) -> int:
    """The bytes beside the model while all planned layers are trained together.

    For each of the model's parameters 4 for the dense one's in float32 and what its own grows by,
    16 for a planned weight, and for what is kept of a batch 4 tokens (in + 2 out) for each layer
    and what follows it and 32 for each of the model's `outputs`. `stages` are those of one batch.
    """
    planned = sum(s.outputs * s.inputs for s in stages)
    kept = sum(s.tokens * (s.inputs + 2 * s.outputs) for s in stages)
    return (8 - itemsize) * parameters + 4 * (DISTILLED * planned + kept + OUTPUTS * outputs)


def _first_batch(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch
) -> tuple[list[Stage], int]:
    """The stages of this batch, and the most bytes of hidden states that a block returns."""
    returned = [0]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if tensors_of(output):
            returned.append(first_tensor(output).nbytes)

    blocks = [block for chain in find_chains(model, layers).values() for block in chain.values()]
    with hooks(block.register_forward_hook(after) for block in blocks):
        stages = list(_stages(model, _reached(model, layers, batch), batch))
    return stages, max(returned)


@torch.no_grad()
def _reached(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch
) -> Mapping[str, nn.Module]:
    """The layers that this batch runs; all if it runs none. It may leave experts out."""
    seen: set[str] = set()

    def before(name: str, module: nn.Module, args: Any) -> None:
        seen.add(name)

    with (
        eval_mode(model),
        hooks(m.register_forward_pre_hook(partial(before, n)) for n, m in layers.items()),
    ):
        answer(model, batch, "calibration batch 0")
    return {name: m for name, m in layers.items() if name in seen} or layers


@torch.no_grad()
def _outputs(model: nn.Module, batch: Batch) -> int:
    """The numbers in the largest tensor that the model returns for the batch."""
    with eval_mode(model):
        returned = tensors_of(answer(model, batch, "the first batch"))
    return max((tensor.numel() for tensor in returned), default=0)


def _forward(stage: Stage) -> float:
    """Operations of its layers' products."""
    return 2.0 * stage.tokens * stage.outputs * stage.inputs


def _stages(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> Iterator[Stage]:
    for observed in observe(model, layers, [batch], [], sequential=True):
        names = list(observed.tokens)
        shapes = [_layers.matrix(layers[name]).shape for name in names]
        yield Stage(
            observed.block,
            tuple((out, columns) for out, columns in shapes),
            observed.tokens[names[0]],
        )


def _size(batch: Batch) -> int:
    return max(1, sum(tensor.numel() for tensor in tensors_of(batch)))


def _seconds(run: Callable[[], object]) -> float:
    """How long a call takes, once warm."""
    run()
    _wait()
    begin = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - begin


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
