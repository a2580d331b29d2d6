"""Self-distillation: a pruned model learns its dense self's outputs, with its zeros held."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.disk.checkpoint import digest
from secateur.core.graphs import Replayed
from secateur.core.interrupts import putting_back
from secateur.core.progress import bar
from secateur.core.shown import Shown, Table
from secateur.core.undo import Undo, all_or_nothing
from secateur.core.weights import pairs_sharing_memory, require_module
from secateur.core.wrappers import unwrapped
from secateur.model.blocks import Batch
from secateur.model.calibrate import as_list
from secateur.model.outputs import answer, device_of, eval_mode, on_device
from secateur.train.hold import hold
from secateur.train.loss import DistillationLoss, output_loss
from secateur.train.state import TrainingState

# The share of the steps before the learning rate is full, because Adam's first moments come from
# few gradients.
WARMUP = 0.05

# Larger gradients are scaled down to this norm, the usual one, because early steps meet outliers.
CLIP = 1.0

# The most that an interruption may cost; each checkpoint writes three times the parameters.
CHECKPOINT_SECONDS = 60.0

# The share of the steps that a reported loss is averaged over: one batch's loss says little.
REPORTED = 0.1


@dataclass(frozen=True)
class DistilReport(Shown):
    """What `distil_` did; `first_loss` and `last_loss` are means over a tenth of the steps."""

    loss: str
    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    learning_rate: float
    seed: int

    @property
    def columns(self) -> tuple[str, ...]:
        return ("loss", "steps", "learning rate", "first loss", "last loss", "seconds")

    def rows(self) -> list[tuple[str, ...]]:
        first, last = f"{self.first_loss:.4g}", f"{self.last_loss:.4g}"
        rate, seconds = f"{self.learning_rate:g}", f"{self.seconds:.1f}"
        return [(self.loss, f"{self.steps:,}", rate, first, last, seconds)]

    @property
    def paragraphs(self) -> tuple[str | Table, ...]:
        return (Table(self.columns, self.rows()),)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode(False)
def distil_(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float = 3e-4,
    loss: DistillationLoss | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> DistilReport:
    """Train the model to give the teacher's outputs on the batches, with every zero held at zero.

    It needs no labels: the dense model is the target, on whatever text or images there are. AdamW
    trains all parameters that require gradients, without weight decay, which would pull away from
    the target. The learning rate rises over the first 5% of the steps and falls along a cosine to
    0; `seed` draws the order of the batches. Both models run in eval mode: dropout would blur the
    target, and running means stay the dense model's. `loss(output, teacher_output, batch)` is
    `output_loss` by default; with `secateur.train.WithTask()` the text or labels count too. With
    `checkpoint`, a folder, the state is saved there once a minute; the same call resumes from it
    and ends with the same bits.

    Cost: a step is a forward of the teacher and a forward and a backward of the model. Memory:
        gradients and two moments, three times the parameters, and a copy of them on disk.
    Raises:
        ValueError: before anything is changed, if the model has no zeros or is held already,
            parameters are not float32 or are the teacher's own, or there is no batch; and if a loss
            is not finite (the step is named). Whatever is raised, even by Ctrl-C, the model is left
            as it was.
    """
    require_module(model)
    require_module(teacher)
    model, teacher = unwrapped(model), unwrapped(teacher)
    with all_or_nothing() as undo:
        run = Distillation(
            model, teacher, as_list(batches), steps, learning_rate, loss or output_loss, seed
        )
        return _distilled(run, checkpoint, undo)


def _distilled(run: "Distillation", checkpoint: str | Path | None, undo: Undo) -> DistilReport:
    parameters = _trained(run.model, run.teacher)
    optimizer = torch.optim.AdamW(parameters.values(), run.learning_rate, weight_decay=0.0)
    with hold(run.model, optimizer) as held:
        return run(Trained(parameters, optimizer, held.mask_gradients_), checkpoint, undo)


def _nothing() -> None:
    """What does nothing."""


@dataclass(frozen=True)
class Trained:
    """What a distillation trains, by AdamW in one group or several.

    `gradients_` is called after each backward, before gradients are clipped: held zeros do not
    count in their norm. `place_` is called before each forward, and at the end. Both may be
    replayed as a CUDA graph. A group's learning rate is the distillation's times its `share`, if it
    has one.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    gradients_: Callable[[], None]
    place_: Callable[[], None] = _nothing

    @property
    def by_optimizer(self) -> list[nn.Parameter]:
        """What the optimizer steps, in its order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step_(self, learning_rate: float, step: int) -> None:
        """Take a step with these gradients."""
        groups = self.optimizer.param_groups
        for group in groups:
            group["lr"] = learning_rate * group.get("share", 1.0)
        norm = nn.utils.clip_grad_norm_(self.by_optimizer, CLIP)
        if not bool(norm.isfinite()):
            raise ValueError(f"distil_ needs finite gradients, got {norm} at step {step}: {_HOW}")
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Distillation:
    """Everything that determines the steps of one distillation."""

    model: nn.Module
    teacher: nn.Module
    batches: list[Batch]
    steps: int
    learning_rate: float
    loss: DistillationLoss
    seed: int

    def __post_init__(self) -> None:
        if self.steps < 1 or not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(
                f"distil_ needs at least 1 step and a learning rate above 0, got {self.steps} and "
                f"{self.learning_rate:g}"
            )

    def __call__(self, trained: Trained, checkpoint: str | Path | None, undo: Undo) -> DistilReport:
        """Train, from the checkpoint's step on if there is one; `undo` puts parameters back."""
        begin = time.perf_counter()
        with (
            contextlib.ExitStack() as stack,
            own_gradients(trained.parameters),
            eval_mode(self.model, self.teacher),
            torch.enable_grad(),
        ):
            state: TrainingState | None = None
            losses: list[float] = []
            if checkpoint is not None:
                state = stack.enter_context(TrainingState(checkpoint, self.fingerprint()))
                begin -= state.seconds
                losses = state.losses
            undo.remember(trained.parameters)
            if state is not None:
                state.restore(trained.parameters, trained.optimizer)
            kept_at = time.perf_counter()
            for loss_now in self._losses(trained, len(losses)):
                losses.append(loss_now)
                now = time.perf_counter()
                due = now - kept_at >= CHECKPOINT_SECONDS or len(losses) == self.steps
                if state is not None and due:
                    state.keep(trained.parameters, trained.optimizer, losses, now - begin)
                    kept_at = now
            trained.place_()
            return _report(self, losses, time.perf_counter() - begin)

    def _losses(self, trained: Trained, done: int) -> Iterator[float]:
        """Take the remaining steps and yield the loss of each."""
        order = _shuffled(len(self.batches), self.steps, self.seed)
        step, device = done, device_of(self.model)

        def backward(batch: Batch) -> list[Tensor | None]:
            return self._backward(trained, step, batch)

        # A loss of the user's own may do more than compute, so it is called at every step.
        replayed = Replayed(backward, device) if self.loss is output_loss else backward
        with bar("distil", self.steps, unit="step", done=done) as shown:
            for step in range(done, self.steps):
                found, *gradients = replayed(on_device(self.batches[order[step]], self.model))
                assert found is not None
                _check_finite(value := float(found), step)
                for parameter, gradient in zip(trained.by_optimizer, gradients, strict=True):
                    parameter.grad = gradient
                trained.step_(self.learning_rate * _rate(step, self.steps), step)
                shown.update()
                shown.set_postfix_str(f"loss={value:.4g}")
                yield value

    def _backward(self, trained: Trained, step: int, batch: Batch) -> list[Tensor | None]:
        """The loss on the batch, and its gradients as the optimizer gets them."""
        trained.place_()
        for parameter in trained.parameters.values():
            parameter.grad = None
        with torch.no_grad():
            target = answer(self.teacher, batch, f"the batch of step {step} (the teacher)")
        value = self.loss(answer(self.model, batch, f"the batch of step {step}"), target, batch)
        if value.numel() != 1 or not value.requires_grad:
            raise ValueError(
                f"distil_ needs a loss that is one number made from the model's output, got shape "
                f"{tuple(value.shape)} with requires_grad={value.requires_grad}"
            )
        value.backward()
        trained.gradients_()
        return [value.detach(), *(parameter.grad for parameter in trained.by_optimizer)]

    def fingerprint(self) -> dict[str, Any]:
        """Plain data that is different for any other call, model, teacher or data."""
        return {
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "loss": _name(self.loss),
            "model": digest(dict(self.model.named_parameters())),
            "teacher": digest(dict(self.teacher.named_parameters())),
            "data": digest(self.batches),
        }


# --- one step ------------------------------------------------------------------------------------


def _check_finite(value: float, step: int) -> None:
    if not math.isfinite(value):
        raise ValueError(f"distil_ needs a finite loss, got {value} at step {step}: {_HOW}")


_HOW = "lower the learning rate, and check the data for extreme values"


def _rate(step: int, steps: int) -> float:
    """The factor of the learning rate: linear up to 1, then half a cosine down to 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def _shuffled(batches: int, steps: int, seed: int) -> list[int]:
    """The index of every step's batch: each batch once a round, each round in a new order."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [
        torch.randperm(batches, generator=generator, device="cpu")
        for _ in range(-(-steps // batches))
    ]
    order: list[int] = torch.cat(rounds)[:steps].tolist()
    return order


# --- before and after ----------------------------------------------------------------------------


def _trained(model: nn.Module, teacher: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    named = {f"model {name}": p for name, p in model.named_parameters()}
    taught = {f"teacher {name}": p for name, p in teacher.named_parameters()}
    shared = {one for one, two in pairs_sharing_memory({**named, **taught}) if two in taught}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            f"distil_ needs parameters that require gradients, this {type(model).__name__} has "
            "none: call model.requires_grad_()"
        )
    for name, parameter in parameters.items():
        if f"model {name}" in shared:
            raise ValueError(
                f"distil_ needs a teacher of its own, {name} is the teacher's too: pass a copy "
                "that was made before pruning, copy.deepcopy(model)"
            )
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"distil_ needs float32 parameters, {name} is {parameter.dtype}, where small steps "
                "are lost: train model.float() and go back with model.to(...), zeros stay zeros"
            )
    return parameters


def _report(run: Distillation, losses: Sequence[float], seconds: float) -> DistilReport:
    few = math.ceil(REPORTED * run.steps)
    first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
    return DistilReport(
        _name(run.loss), run.steps, seconds, first, last, run.learning_rate, run.seed
    )


def _name(loss: DistillationLoss) -> str:
    """A function's name, or a value with its fields."""
    if is_dataclass(loss):
        return repr(loss)
    return getattr(loss, "__name__", type(loss).__name__)


@contextlib.contextmanager
def own_gradients(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Clear the gradients, and restore them at the end."""
    with putting_back() as stack:
        for parameter in parameters.values():
            stack.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
        yield
