"""An estimate of how long a preset takes and how much memory, printed before it starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from secateur.core.shown import Shown
from secateur.model.blocks import Batch, find_chains, hooks, tensors_of
from secateur.model.calibrate import pieces_shown
from secateur.model.half_blocks import first_tensor
from secateur.model.layers import weight_of
from secateur.model.outputs import answer, eval_mode
from secateur.model.statistics import STATISTICS, is_held_out
from secateur.patterns import Pattern
from secateur.reconstruct.alps import alps
from secateur.reconstruct.blockwise import Blockwise
from secateur.reconstruct.methods import bind_algorithm
from secateur.reconstruct.presets import best
from secateur.reconstruct.rehearsal import (
    Stage,
    rehearse,
    seconds_of_a_forward,
    seconds_of_a_step,
    seconds_on_grid,
    slower_in_float32,
    stages_of,
)

# Float32 matrices alive at once while a layer is solved, in x in and out x in, counted in `alps`.
SQUARES, WEIGHTS = 9, 14
SUMS = 4  # of the squares: both Gram matrices and their sums, which outlive the solution
# While a half-block is trained: weights, the best so far, gradients, two moments, two temporaries.
TRAINED = 7
HIDDEN_STATES = 4  # two streams and the targets of two halves
# While the whole model is trained, in float32: per planned weight a gradient, two moments and a
# temporary; per output the logarithms and gradients of both models.
DISTILLED, OUTPUTS = 4, 8
ON_A_GRID = 2  # more for each planned weight there: latent weights, and gradients straight through


@dataclass(frozen=True)
class Estimate(Shown):
    """About how long a preset takes, and its peak memory on the device beyond the model's."""

    seconds: float
    bytes: int
    device: str

    @property
    def paragraphs(self) -> tuple[str]:
        hours, minutes = divmod(round(self.seconds / 60), 60)
        duration = f"{hours} h {minutes} min" if hours else f"{minutes} min"
        if self.seconds < 60:
            duration = f"{self.seconds:.0f} s"
        memory = f"{self.bytes / 1e9:.1f} GB" if self.bytes >= 1e8 else f"{self.bytes / 1e6:.1f} MB"
        return (f"about {duration} on {self.device}, and {memory} of memory beside the model",)


def estimate(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    patterns: Mapping[str, Pattern],
    batches: Sequence[Batch],
    method: Blockwise = best,
    *,
    offload: bool = False,
) -> Estimate:
    """What `best`, or `thorough`, will take for these layers; nothing is changed.

    The first batch shows how many tokens each layer sees, which layers share an input and how large
    the hidden states are; other batches count by their size. The time comes from a rehearsal on one
    block of each kind, four kinds at most: the block runs on the first batch, its layers are solved
    on the first few, and its half-blocks take training steps, on copies. For the other blocks it is
    scaled by their operations, and so it is for a layer with more than 512 inputs or outputs (4,096
    on a GPU), of which only that much is solved. Bytes are counted, not measured: `peak_bytes` and
    `distilling_bytes`.

    Cost: a few batches through the model, a few training steps, and one block's layers solved.
    Raises:
        ValueError: as `reconstruct_`, if the model cannot run the first batch; if the method asks
            for gradients.
    """
    needs = bind_algorithm(method.alone).needs
    if gradients := [name for name in needs if name not in STATISTICS]:
        raise ValueError(f"estimate has no gradients, {method.name} needs {gradients[0]}: use alps")
    weight = weight_of(next(iter(layers.values())))
    times = sum(map(_size, batches)) / _size(batches[0])
    held = times * sum(is_held_out(b) for b in range(len(batches))) / len(batches)
    stages, hidden = _first_batch(model, layers, batches[0])
    passes, seconds = rehearse(model, layers, patterns, batches, method, stages)
    step, look = sum(one.step for one in passes), sum(one.look for one in passes)
    seconds += times * sum(one.batch for one in passes)
    epochs = method.epochs + method.epochs_on_grid
    seconds += epochs * (times - held) * step + (epochs + (2 if method.grid else 1)) * held * look
    bytes = peak_bytes(stages, 0 if offload else round(hidden * times), weight.itemsize)
    if method.distil:
        together = seconds_of_a_step(model, layers, batches[0])
        judged = 6 * held * seconds_of_a_forward(model, batches[0])  # by both models, three times
        on_grid = 0.0
        if method.grid is not None:  # all layers see their inputs again, as trained so far
            seconds += times * sum(one.batch for one in passes)
            on_grid = method.distil_on_grid * (together + seconds_on_grid(layers, method.grid))
        seconds += slower_in_float32(stages, weight.dtype, weight.device) * (
            (times - held) * (method.distil * together + on_grid) + judged
        )
        parameters = sum(parameter.numel() for parameter in model.parameters())
        outputs = _outputs(model, batches[0])
        at_the_end = distilling_bytes(
            stages, parameters, outputs, weight.itemsize, method.grid is not None
        )
        bytes = max(bytes + parameters * weight.itemsize, at_the_end)
    return Estimate(seconds, bytes, str(weight.device))


def foretold(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    patterns: Mapping[str, Pattern],
    batches: Sequence[Batch],
    method: Blockwise,
    *,
    offload: bool,
) -> Estimate | None:
    """The estimate, or None unless the layers' method is `alps`, whose memory is counted here."""
    if method.method is not alps:
        return None
    return estimate(model, layers, patterns, batches, method, offload=offload)


def peak_bytes(stages: Sequence[Stage], hidden: int, itemsize: int) -> int:
    """Peak memory beyond the model, in bytes; `hidden` is the size of all hidden states.

    Four copies of the hidden states, and the larger of what solving a layer takes,
    4 (9 in^2 + 14 out in), and what training the layers of a block together takes: 28 bytes per
    weight, what a batch keeps for the backward, tokens (in + 2 out) numbers for each layer and what
    follows it, and the Gram matrices of a layer, 16 in^2, or of all experts of a stack. `stages`
    come from one batch.
    """
    grams = max(SUMS * stage.apart * stage.inputs**2 for stage in stages)
    solving = max(
        4 * ((SQUARES + SUMS * (stage.apart - 1)) * columns**2 + WEIGHTS * out * columns)
        for stage in stages
        for out, columns in stage.shapes
    )
    training = 0
    for block in {stage.block for stage in stages}:
        inside = [stage for stage in stages if stage.block == block]
        weights = sum(s.outputs * s.inputs for s in inside)
        kept = sum(s.tokens * (s.apart * s.inputs + 2 * s.outputs) for s in inside)
        training = max(training, 4 * TRAINED * weights + itemsize * kept)
    return HIDDEN_STATES * hidden + max(solving, 4 * grams + training)


def distilling_bytes(
    stages: Sequence[Stage], parameters: int, outputs: int, itemsize: int, on_grid: bool = False
) -> int:
    """Memory beyond the model, in bytes, while all planned layers are trained together.

    For each parameter, 4 bytes in the dense model in float32, and what it grows by in this one; 16
    per planned weight, 24 on a grid; for what a batch keeps, 4 tokens (in + 2 out) for each layer
    and what follows it, and 32 for each of the model's `outputs`. `stages` come from one batch.
    """
    planned = sum(s.outputs * s.inputs for s in stages)
    kept = sum(s.tokens * (s.apart * s.inputs + 2 * s.outputs) for s in stages)
    each = DISTILLED + ON_A_GRID if on_grid else DISTILLED
    return (8 - itemsize) * parameters + 4 * (each * planned + kept + OUTPUTS * outputs)


def _first_batch(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch
) -> tuple[list[Stage], int]:
    """The stages of this batch, and the bytes of the largest hidden states a block returns."""
    returned = [0]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if tensors_of(output):
            returned.append(first_tensor(output).nbytes)

    blocks = [block for chain in find_chains(model, layers).values() for block in chain.values()]
    with hooks(block.register_forward_hook(after) for block in blocks):
        stages = list(stages_of(model, _reached(model, layers, batch), batch))
    return stages, max(returned)


@torch.no_grad()
def _reached(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch
) -> Mapping[str, nn.Module]:
    """The layers that this batch runs, which may leave experts out; all layers if it runs none."""
    seen: set[str] = set()

    def before(name: str, module: nn.Module, args: Any) -> None:
        seen.add(name)

    with (
        eval_mode(model),
        pieces_shown(model, layers),
        hooks(m.register_forward_pre_hook(partial(before, n)) for n, m in layers.items()),
    ):
        answer(model, batch, "calibration batch 0")
    return {name: m for name, m in layers.items() if name in seen} or layers


@torch.no_grad()
def _outputs(model: nn.Module, batch: Batch) -> int:
    """The size of the largest tensor that the model returns for the batch, in elements."""
    with eval_mode(model):
        returned = tensors_of(answer(model, batch, "the first batch"))
    return max((tensor.numel() for tensor in returned), default=0)


def _size(batch: Batch) -> int:
    return max(1, sum(tensor.numel() for tensor in tensors_of(batch)))
