"""`accelerate_training_`: 2:4 layers that train by kernels where that is faster on this machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.accelerate.candidates import Candidate, admitted, failure
from secateur.accelerate.tokens import day_of
from secateur.core.autocast import autocast_dtype, without_autocast
from secateur.core.undo import all_or_nothing
from secateur.core.weights import require_module
from secateur.core.wrappers import unwrapped
from secateur.formats import training, two_of_four
from secateur.formats.kernels.both_ways import Selection
from secateur.formats.kernels.timing import (
    Calls,
    Timing,
    VariantFailed,
    compare,
    copies_for,
    copies_on,
)
from secateur.formats.pack import linears_of, named_linears
from secateur.formats.training import TrainingLinear

DENSE, PACKED = "dense", "2:4"
GAIN = 1.05  # of the dense step's time over the packed one's, from which a layer changes

Timer = Callable[[Mapping[str, Calls], torch.device], Mapping[str, Timing]]


@dataclass(frozen=True)
class TrainingLayer:
    """A layer, microseconds of its dense and its packed step by number of tokens, and the choice.

    `least_tokens` is from how many on it runs packed, None if it stays dense, and `reason` why.
    """

    layer: str
    shape: tuple[int, int]
    microseconds: Mapping[int, tuple[float, float]]
    least_tokens: int | None
    reason: str

    def __str__(self) -> str:
        measured = ", ".join(
            f"{tokens} tokens {dense:.0f} us dense, {packed:.0f} packed"
            for tokens, (dense, packed) in self.microseconds.items()
        )
        runs = "dense" if self.least_tokens is None else f"packed from {self.least_tokens} tokens"
        return f"{self.layer}: {runs}, {self.reason}" + (f" ({measured})" if measured else "")


class AcceleratedTraining:
    """What was measured; `release()`, or the end of a `with` block, puts the plain layers back."""

    def __init__(self, model: nn.Module, layers: tuple[TrainingLayer, ...]) -> None:
        self.layers = layers
        self._model = model

    def release(self) -> None:
        """Put the plain layers back, with the parameters as they are now."""
        for module in self._model.modules():
            _restore(module)

    def __enter__(self) -> "AcceleratedTraining":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers))


def accelerate_training_(
    model: nn.Module, tokens: Sequence[int] = (4096,), layers: Sequence[str] | None = None
) -> AcceleratedTraining:
    """What was measured; layers whose training step is faster packed are now `TrainingLinear`.

    For models whose weights are 2:4 and stay so, by `hold` or `learn_masks_`; call it before or
    behind those.
    A step is forward and backward of one layer, packing included, at each number of tokens that a
    step has. A layer changes if its results are right and it is 5 % faster at the largest number;
    it runs packed from the least number on at which, and above which, that holds. Called under
    autocast it measures what autocast runs. Modules and parameters stay the very same, so that
    optimizers, hooks, keys and saving are as ever; layers are plain again by `release()`.

    A packed layer's input gradient is that of its weight pruned once more along columns.

    Cost: seconds per distinct layer; on a GPU copies of it that no cache holds.
    Raises: ValueError for unknown layers, or numbers of tokens that are none. Then, and if it is
        interrupted, the model is unchanged.
    """
    require_module(model)
    with all_or_nothing() as undo:
        counts = day_of(tokens).tokens
        model = unwrapped(model)
        rows = _measured(model, counts, layers, compare)
        for row in rows:
            module = model.get_submodule(row.layer)
            if row.least_tokens is not None and type(module) is nn.Linear:
                undo.call(_restore, module)
                TrainingLinear.become(module, row.least_tokens)
    return AcceleratedTraining(model, rows)


def _restore(module: nn.Module) -> None:
    if isinstance(module, TrainingLinear):
        module.restore()


def _measured(
    model: nn.Module, counts: Sequence[int], layers: Sequence[str] | None, timer: Timer
) -> tuple[TrainingLayer, ...]:
    linears = linears_of(model) if layers is None else named_linears(model, layers)
    known, rows = dict[object, Steps](), list[TrainingLayer]()
    for name, linear in linears.items():
        shape = linear.out_features, linear.in_features
        problem, steps = _why_not(model.get_submodule(name)), Steps({}, "")
        if problem is None:
            weight = linear.weight
            like = shape, weight.dtype, weight.device, linear.bias is None
            if like not in known:
                known[like] = _steps(linear, counts, timer)
            steps = known[like]
            problem = steps.problem
        rows.append(TrainingLayer(name, shape, steps.microseconds, *_choice(steps, problem)))
    return tuple(rows)


@dataclass(frozen=True)
class Steps:
    """Microseconds of a dense and a packed step by number of tokens, or why there are none."""

    microseconds: Mapping[int, tuple[float, float]]
    problem: str


def _why_not(module: nn.Module) -> str | None:
    """Why the layer cannot train packed here, or None."""
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, not a plain nn.Linear"
    if "forward" in vars(module):
        return "its forward has been replaced, which would not run: restore it first"
    weight = module.weight
    if not weight.requires_grad:
        return "its weight is frozen, and would be packed anew in each step: use accelerate_"
    dtype = autocast_dtype(weight.device) or weight.dtype
    problem = training.why_not((weight.shape[0], weight.shape[1]), dtype, weight.device)
    return problem or two_of_four.why_not(weight.detach(), "training in 2:4")


def _choice(steps: Steps, problem: str | None) -> tuple[int | None, str]:
    """From how many tokens on the layer runs packed, and why."""
    if problem:
        return None, problem
    least = None
    for count, (dense, packed) in sorted(steps.microseconds.items(), reverse=True):
        if dense < GAIN * packed:
            break
        least = count
    if least is None:
        return None, f"its step is not {GAIN - 1:.0%} faster packed at the most tokens"
    return least, "where its step is faster"


def _steps(linear: nn.Linear, counts: Sequence[int], timer: Timer) -> Steps:
    device = linear.weight.device
    dtype = autocast_dtype(device)
    microseconds = dict[int, tuple[float, float]]()
    try:
        with without_autocast(device):
            for count in counts:
                x = _random(count, linear.in_features, dtype or linear.weight.dtype, device)
                if wrong := _why_wrong(linear, x):
                    return Steps({}, wrong)
                grad = _random(count, linear.out_features, x.dtype, device)
                copies = _copies(linear)
                calls: dict[str, Calls] = {
                    name: [partial(_step, one, x, grad, dtype, name == PACKED) for one in copies]
                    for name in (DENSE, PACKED)
                }
                times = timer(calls, device)
                microseconds[count] = times[DENSE].median_us, times[PACKED].median_us
    except (RuntimeError, MemoryError, VariantFailed) as problem:
        return Steps(microseconds, failure("measuring its step", problem))
    return Steps(microseconds, "")


def _random(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(rows)
    numbers = torch.randn(rows, width, generator=generator, device=device, dtype=torch.float32)
    return numbers.to(dtype)


def _why_wrong(linear: nn.Linear, x: Tensor) -> str | None:
    """How the packed layer's result is wrong, or None."""
    plain = nn.Linear(linear.in_features, linear.out_features, device="meta")
    for name, one in (("weight", linear.weight), ("bias", linear.bias)):
        fixed = None if one is None else nn.Parameter(one.detach().to(x.dtype), requires_grad=False)
        setattr(plain, name, fixed)

    def run(x: Tensor) -> Tensor:
        return training.linear(x, plain.weight, plain.bias, Selection.ROWS)

    holds = {"weight": plain.weight.nbytes}
    _, wrong = admitted([Candidate(PACKED, lambda: run, holds, ("weight",))], plain, x)
    return wrong[0] if wrong else None


def _copies(linear: nn.Linear) -> list[list[Tensor | None]]:
    """Weights and biases that no cache holds together."""
    weight, bias = linear.weight, linear.bias
    if weight.is_cuda:
        count = copies_on(weight.device, weight.nbytes, weight.nbytes, 1)
    else:
        count = copies_for(weight.nbytes)
    return [
        [None if one is None else one.detach().clone().requires_grad_() for one in (weight, bias)]
        for _ in range(count)
    ]


@torch.enable_grad()
def _step(
    parameters: list[Tensor | None],
    x: Tensor,
    grad: Tensor,
    dtype: torch.dtype | None,
    is_packed: bool,
) -> object:
    """Forward and backward, of the input and the parameters."""
    weight, bias = parameters
    assert weight is not None
    leaf = x.detach().requires_grad_()
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
        if is_packed:
            result = training.linear(leaf, weight, bias, Selection.ROWS)
        else:
            result = F.linear(leaf, weight, bias)
    wanted = [one for one in (leaf, weight, bias) if one is not None]
    return torch.autograd.grad(result, wanted, grad)
