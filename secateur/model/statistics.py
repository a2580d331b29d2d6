"""Statistics: named running sums over the inputs of a layer.

A criterion or an algorithm asks for a statistic by naming a parameter after it. To add one, write a
class here and a line in `STATISTICS`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

T = TypeVar("T")


@runtime_checkable
class Statistic(Protocol):
    """A running sum: made for a number of inputs, updated with rows, read once at the end.

    If several processes calibrate together, `sums` are added up over them before it is read. A
    batch is identified by its number, counted over all processes.
    """

    @property
    def sums(self) -> tuple[Tensor, ...]: ...

    def update(self, rows: Float[Tensor, "tokens in"], batch: int) -> None: ...

    def value(self, tokens: int) -> Tensor: ...


class InputNorm:
    """`input_norm`, [in]: ||x_j||_2 of every input j over all calibration tokens, as in Wanda."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, dtype=torch.float32, device=device)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return (self._sum,)

    def update(self, rows: Float[Tensor, "tokens in"], batch: int) -> None:
        self._sum += rows.float().square().sum(0)

    def value(self, tokens: int) -> Float[Tensor, " in"]:
        return self._sum.sqrt()


class Gram:
    """`gram`, [in, in]: G = X^T X / tokens in float32, the Hessian of a layer's output error.

    Cost: 2 tokens in^2 operations; for 16-bit inputs on a GPU in tensor cores, with in^2 more
        float32 numbers of memory.
    Error: float32 summation; products of 16-bit numbers are exact in float32.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return (self._sum,)

    def update(self, rows: Float[Tensor, "tokens in"], batch: int) -> None:
        if _for_tensor_cores(rows):
            self._sum += torch.mm(rows.T, rows, out_dtype=torch.float32)
        else:
            rows = rows.float()
            self._sum.addmm_(rows.T, rows)

    def value(self, tokens: int) -> Float[Tensor, "in in"]:
        return self._sum / tokens


def _for_tensor_cores(rows: Tensor) -> bool:
    """Whether products of these rows can be summed in float32 without casting the rows to float32.

    torch refuses to for float16 if the user allows such products to be summed in float16.
    """
    in_float16 = torch.backends.cuda.matmul.allow_fp16_accumulation
    exact = (torch.bfloat16,) if in_float16 else (torch.bfloat16, torch.float16)
    return rows.is_cuda and rows.dtype in exact


# One batch in eight is held out of the fit, to choose between fits.
HELD_OUT = 8


def is_held_out(batch: int) -> bool:
    """Whether the batch of this number, from 0, is held out: the second, and every eighth after."""
    return batch % HELD_OUT == 1


class HeldGram:
    """`held_gram`, [in, in]: the part of `gram` that comes from held-out batches, in its units.

    `gram - held_gram` is the part of the other batches. With a single batch nothing is held out,
    and this is zero.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._gram = Gram(in_features, device)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return self._gram.sums

    def update(self, rows: Float[Tensor, "tokens in"], batch: int) -> None:
        if is_held_out(batch):
            self._gram.update(rows, batch)

    def value(self, tokens: int) -> Float[Tensor, "in in"]:
        return self._gram.value(tokens)


STATISTICS: Mapping[str, Callable[[int, torch.device], Statistic]] = MappingProxyType(
    {"input_norm": InputNorm, "gram": Gram, "held_gram": HeldGram}
)

# These are not sums over inputs, but are asked for in the same way: see `secateur.model.gradients`.
GRADIENTS = ("gradient", "squared_gradient", "regional_gradient")


def needed_by(function: Callable[..., Any], given: tuple[str, ...]) -> tuple[str, ...]:
    """The statistics that a criterion or an algorithm needs: its parameters that are not `given`.

    A parameter named after a sum over inputs gets it even if it has a default, which is then for
    calls by hand. Other parameters with a default are options, as are those that a partial fixes.

    Raises:
        ValueError: if a parameter is neither given nor a statistic.
    """
    parameters = inspect.signature(function).parameters.values()
    names = [
        p.name
        for p in parameters
        if p.name not in given and (p.default is p.empty or p.name in STATISTICS)
    ]
    for name in names:
        if name not in STATISTICS and name not in GRADIENTS:
            known = ", ".join([*given, *STATISTICS, *GRADIENTS])
            raise ValueError(
                f"{name_of(function)} asks for {name!r}, which is no statistic: its parameters may "
                f"be named {known}; an option needs a default"
            )
    return tuple(names)


def call(function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments), computed every time: the `memo` of an algorithm called by hand."""
    return function(*arguments)


def name_of(function: Callable[..., Any]) -> str:
    """The function's name as the user knows it, with the options that a partial fixes."""
    if isinstance(function, functools.partial):
        options = ", ".join(f"{key}={value!r}" for key, value in function.keywords.items())
        return f"{name_of(function.func)}({options})"
    return getattr(function, "__name__", None) or repr(function)
