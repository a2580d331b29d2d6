"""Training with 2:4 weights or activations, pruned again in each forward.

On a Hopper GPU, in 16 bits or under autocast, weights are packed and multiplied by the kernels of
`secateur.formats.training`. Elsewhere, and for activations, dense matrices that contain the zeros
are multiplied: the same numbers, but slower than dense training, because it adds the pruning and no
kernel skips the zeros. To keep zeros through training at the cost of dense training, use `sc.hold`.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.compat.torchao.names import closest
from secateur.compat.torchao.swap import HOOKS
from secateur.core.undo import all_or_nothing
from secateur.formats import training
from secateur.formats.kernels.both_ways import Selection
from secateur.formats.kernels.both_ways.reference import kept
from secateur.formats.pack import swap

T = TypeVar("T", bound=nn.Linear)

ALGORITHMS = ("", "largest_abs_values_greedy")
BACKENDS = ("cutlass", "cusparselt")


class _StraightThrough(torch.autograd.Function):
    """The matrix with the zeros of its tiles; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.masked_fill(~tile_mask(x), 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def semi_structured_sparsify(
    x: Float[Tensor, "..."], algo: str = "", backend: str = "cutlass"
) -> Float[Tensor, "rows columns"]:
    """The dense matrix, made 2:4 along rows and columns by magnitude in tiles of 4 x 4.

    The gradient of the result passes unchanged to every entry. All backends give the same result.

    Raises:
        ValueError: for another algorithm or backend, or a tensor that is no matrix.
    """
    if algo not in ALGORITHMS:
        raise ValueError(
            f"semi_structured_sparsify has one algorithm, 'largest_abs_values_greedy', got "
            f"{algo!r}: leave it out"
        )
    if backend not in BACKENDS:
        raise ValueError(
            f"semi_structured_sparsify needs one of {BACKENDS} as backend, got {backend!r}: leave "
            "it out, they give the same"
        )
    if x.dim() != 2:
        raise ValueError(
            f"semi_structured_sparsify needs a matrix, got shape {tuple(x.shape)}: flatten it to "
            "[rows, columns]"
        )
    return _pruned(x)


def tile_mask(x: Float[Tensor, "rows columns"]) -> Bool[Tensor, "rows columns"]:
    """The mask, True = keep: the largest magnitudes, at most 2 in each row and column of a tile.

    Each tile of 4 x 4 goes through its entries by magnitude, ties in row order, and keeps an entry
    while fewer than two of its row and of its column are kept. That keeps 8 of 16, sometimes 7,
    because those that remain can lie in a full row. Tiles at the edges are filled up with zeros.

    Source: the greedy choice of torch._sparse_semi_structured_tile.
    """
    mask, _ = kept(x, Selection.GREEDY)
    return mask


class _Emulated(nn.Linear):
    """A linear layer that takes the place of a dense one and gives it back."""

    @classmethod
    def from_dense(cls: type[T], linear: nn.Linear) -> T:
        """The layer with the very parameters, hooks and training mode of a dense one."""
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        _take_over(new, linear)
        return new

    @classmethod
    def to_dense(cls, semi_sparse_linear: nn.Linear) -> nn.Linear:
        """The dense layer with the very parameters of this one, none of which is zeroed."""
        return _dense(semi_sparse_linear)


class SemiSparseLinear(_Emulated):
    """A linear layer whose weight is 2:4 in every forward and backward; its parameter stays dense.

    The output and the input's gradient are those of the pruned weight, which is 2:4 in both
    directions. The weight's gradient is the dense one, so that pruned weights can come back.
    What runs it: see the module.
    """

    def forward(self, input: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        return training.linear(input, self.weight, self.bias, Selection.GREEDY)


class SemiSparseActivationLinear(_Emulated):
    """A linear layer whose input, as a matrix of tokens, is 2:4 in every forward.

    The weight's gradient is that of the pruned input, the input's gradient the dense one.
    Not faster than `nn.Linear`: see the module.
    """

    def forward(self, input: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        tokens = _pruned(input.reshape(-1, self.in_features))
        return F.linear(tokens.view_as(input), self.weight, self.bias)


def swap_linear_with_semi_sparse_linear(
    model: nn.Module, config: Mapping[str, type[nn.Module]]
) -> None:
    """Replace the linear layers named by the config, each by the class given for it.

    Names are those of `model.named_modules()`. Parameters, hooks and the training mode are kept.

    Raises:
        ValueError: before anything is changed, if a name is unknown (with the closest ones), is
            not that of a plain `nn.Linear`, or its class has no `from_dense`.
    """
    layers = dict(model.named_modules())
    for name, target in config.items():
        if name not in layers:
            linears = [n for n, module in layers.items() if isinstance(module, nn.Linear)]
            raise ValueError(
                f"no layer of {type(model).__name__} is named {name!r}: closest are "
                f"{closest(name, linears)}"
            )
        if name == "" or type(layers[name]) is not nn.Linear:
            raise ValueError(
                f"{name!r} needs to be an nn.Linear inside the model, it is a "
                f"{type(layers[name]).__name__}: name the layers one by one, or wrap a bare one "
                "in nn.Sequential"
            )
        if not callable(getattr(target, "from_dense", None)):
            raise ValueError(
                f"{name!r} needs a class with from_dense, got {target!r}: give SemiSparseLinear "
                "or SemiSparseActivationLinear"
            )
    made: Mapping[str, Any] = config  # each has a from_dense
    replacements = {name: target.from_dense(layers[name]) for name, target in made.items()}
    with all_or_nothing() as undo:
        swap(model, replacements, undo)


def swap_semi_sparse_linear_with_linear(model: nn.Module) -> None:
    """Replace every `SemiSparseLinear` and `SemiSparseActivationLinear` by a dense `nn.Linear`.

    Raises:
        ValueError: before anything is changed, if the model itself is one.
    """
    found = {
        name: module for name, module in model.named_modules() if isinstance(module, _Emulated)
    }
    if "" in found:
        raise ValueError(
            f"swap needs a model that holds its layers, got a bare {type(model).__name__}: use "
            "to_dense"
        )
    replacements = {name: _dense(module) for name, module in found.items()}
    with all_or_nothing() as undo:
        swap(model, replacements, undo)


def _pruned(x: Tensor) -> Tensor:
    result: Tensor = _StraightThrough.apply(x)  # type: ignore[no-untyped-call]
    return result


def _dense(layer: nn.Linear) -> nn.Linear:
    new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    _take_over(new, layer)
    return new


def _take_over(new: nn.Linear, old: nn.Linear) -> None:
    """Share parameters, which an optimizer may hold, and copy hooks and the training mode."""
    new.weight, new.bias = old.weight, old.bias
    new.train(old.training)
    for name in HOOKS:
        vars(new)[name].update(vars(old)[name])
