"""Layers as products of two thin ones: W x becomes B (A x), with fewer multiplications.

The pair is what keeps most of the layer's output on the calibration inputs, and not most of the
weight: the truncated singular value decomposition of W H^(1/2), with H the second moment of the
inputs. Whitening by any factor of H gives the same pair (SVD-LLM uses Cholesky's).
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.conv1d import is_conv1d
from secateur.core.float64 import in_float64
from secateur.core.progress import bar
from secateur.core.shown import Shown, Table
from secateur.core.undo import Undo, all_or_nothing
from secateur.core.wrappers import unwrapped
from secateur.model import layers as _layers
from secateur.model.blocks import Batch
from secateur.model.calibrate import as_list, observe
from secateur.model.layers import Selector, weight_of
from secateur.model.outputs import answer, eval_mode
from secateur.model.piece import Piece
from secateur.prune.preconditions import require_sound
from secateur.reconstruct.lowrank import compensation, output_errors


@dataclass(frozen=True)
class Factorised:
    """What became of one layer of `out` x `in_` weights.

    `error` is the share of its output energy that is lost, ||(W - B A) X||^2 / ||W X||^2 on the
    calibration inputs.
    """

    layer: str
    out: int
    in_: int
    rank: int
    error: float
    tokens: int

    @property
    def before(self) -> int:
        """The weights that it had, as many as its multiplications for a token."""
        return self.out * self.in_

    @property
    def after(self) -> int:
        """The weights that the pair has."""
        return self.rank * (self.out + self.in_)


@dataclass(frozen=True)
class FactoriseReport(Shown):
    """What `factorise_` did layer by layer, and why it left other layers as they are."""

    layers: tuple[Factorised, ...]
    left: Mapping[str, str]
    parameters_before: int
    parameters: int
    seconds: float

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each pair, as `as_pairs_` takes them."""
        return {layer.layer: layer.rank for layer in self.layers}

    @property
    def columns(self) -> tuple[str, ...]:
        return ("layer", "out", "in", "rank", "weights before", "after", "output error", "tokens")

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                r.layer,
                *map(str, (r.out, r.in_, r.rank)),
                f"{r.before:,}",
                f"{r.after:,}",
                f"{r.error:.4f}",
                f"{r.tokens:,}",
            )
            for r in self.layers
        ]

    @property
    def paragraphs(self) -> tuple[str | Table, ...]:
        before, after = (sum(getattr(r, when) for r in self.layers) for when in ("before", "after"))
        left = "".join(f"\n  {n} layers: {why}" for why, n in Counter(self.left.values()).items())
        return (
            Table(self.columns, self.rows()),
            f"{len(self.layers)} layers became pairs in {self.seconds:.1f} s: {before:,} weights, "
            f"and multiplications a token, became {after:,}; {self.parameters_before:,} parameters "
            f"of the model became {self.parameters:,}. The state dict has other keys than before"
            + (f"\nleft as they are:{left}" if left else ""),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ranks": self.ranks}


@torch.inference_mode(False)
def factorise_(
    model: nn.Module,
    batches: Iterable[Batch],
    share: float,
    *,
    layers: Selector | Sequence[Selector] | None = None,
    ignore: Selector | Iterable[Selector] = (),
    damping: float = 0.01,
    offload: bool = False,
) -> FactoriseReport:
    """Replace linear layers by pairs of thinner ones with this share of their weights less.

    A layer of `out` x `in` weights becomes `nn.Sequential(nn.Linear(in, rank, bias=False),
    nn.Linear(rank, out))`, with the largest rank for which at least that share of its weights, and
    of its multiplications, is gone. The pair is the best of its rank for the layer's outputs on the
    batches; layers are taken in the order in which they run, each on inputs that the pairs before
    it make. `layers` and `ignore` choose as in `sc.plan`; layers that are none, or too small to
    gain, are left, with the reason in the report. `offload` keeps activations between blocks on
    the CPU.

    What is left is an ordinary model, and the keys of its state dict are others, as they must be:
    transformers' `from_pretrained` cannot load it. To load its state dict, make the dense model and
    call `as_pairs_` with the report's `ranks`.

    Cost: `secateur.reconstruct.lowrank.compensation` once per layer, and memory as in
        `reconstruct_` with a Gram matrix; the originals are kept on disk meanwhile.
    Error: factors are computed in float64 and rounded to the weight's dtype.
    Raises:
        ValueError: before anything is changed, if the share is not in (0, 1), a selector matches
            nothing, no layer gains, or the model cannot run the batches. If the model cannot run
            the pairs, as one that reads a layer's weight; whatever is raised, also by Ctrl-C, the
            model is left as it was.
    Source: SVD-LLM, Wang et al. 2024, arXiv:2403.07378, section 3.1, for the truncation; the pair
        is EoRA's of the whole weight, arXiv:2410.21271.
    """
    begin = time.perf_counter()
    if not 0 < share < 1:
        raise ValueError(f"share is of the weights that go, in (0, 1), got {share:g}: try 0.25")
    model, listed = unwrapped(model), as_list(batches)
    chosen, left = _chosen(model, share, layers, ignore)
    require_sound(chosen)
    with all_or_nothing() as undo:
        before = _parameters(model)
        results = _factorise(model, chosen, listed, share, damping, offload, undo)
        after = _parameters(model)
        return FactoriseReport(results, left, before, after, time.perf_counter() - begin)


def as_pairs_(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Replace layers by pairs of these ranks whose values do not matter, to load a state dict into.

    Raises:
        ValueError: before anything is changed, if a layer is missing or is none that can be one.
    """
    model = unwrapped(model)
    modules = _layers.layers_of(model)
    for name in ranks:
        reason = "there is none" if name not in modules else _why_no_pair(modules[name])
        if reason:
            raise ValueError(f"{name} cannot become a pair: {reason}")
    with all_or_nothing() as undo:
        pairs = {}
        for name, rank in ranks.items():
            weight = _layers.matrix(modules[name])
            out, in_ = weight.shape
            pairs[name] = _pair(
                modules[name], weight.new_zeros(out, rank), weight.new_zeros(rank, in_)
            )
        _put_(model, pairs, undo)


def rank_for(out: int, in_: int, share: float) -> int:
    """The largest rank r with r (out + in) <= (1 - share) out in, for the share as written."""
    return int((1 - Fraction(str(share))) * out * in_ / (out + in_))


def _factorise(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: list[Batch],
    share: float,
    damping: float,
    offload: bool,
    undo: Undo,
) -> tuple[Factorised, ...]:
    """The layers as pairs; meanwhile each weight is the product, so that what follows sees it."""
    pairs: dict[str, nn.Module] = {}
    results: dict[str, Factorised] = {}
    undo.remember({name: weight_of(module) for name, module in layers.items()})
    seen = observe(model, layers, batches, ["gram"], sequential=True, offload=offload)
    with (
        torch.no_grad(),
        contextlib.closing(seen),
        bar("factorise", len(layers), unit="layer") as shown,
    ):
        for observed in seen:
            for name, statistics in observed.statistics.items():
                module, gram = layers[name], statistics["gram"]
                W = _layers.matrix(module)
                out, in_ = W.shape
                rank = rank_for(out, in_, share)
                B, A = compensation(W, torch.zeros_like(W), gram, rank, damping)
                product = in_float64(B) @ in_float64(A)
                none = torch.zeros_like(product)
                _, error = output_errors(in_float64(W), none, product, gram)
                tokens = observed.tokens[name]
                results[name] = Factorised(name, out, in_, rank, error, tokens)
                pairs[name] = _pair(module, B, A)
                weight_of(module).copy_(_layers.from_matrix(module, product.to(W)))
                shown.update()
    _put_(model, pairs, undo)
    with torch.no_grad(), eval_mode(model):
        try:
            answer(model, batches[0], "batch 0 with pairs in place of layers")
        except AttributeError as error:  # of a layer's, such as its weight
            raise ValueError(
                f"{type(model).__name__} cannot run pairs in place of layers: {error}: leave out "
                "the layer that it reads, with ignore="
            ) from error
    return tuple(results[name] for name in layers)


def _chosen(
    model: nn.Module,
    share: float,
    layers: Selector | Sequence[Selector] | None,
    ignore: Selector | Iterable[Selector],
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that become pairs, and why each of the others is left."""
    selection = _layers.select(model, layers, ignore)
    left, chosen = dict(selection.skipped), dict[str, nn.Module]()
    for name, module in selection.layers.items():
        out, in_ = _layers.matrix(module).shape
        if reason := _why_no_pair(module):
            left[name] = reason
        elif rank_for(out, in_, share) < 1:
            left[name] = f"{out} x {in_} weights are too few for a pair of {1 - share:.0%} of them"
        else:
            chosen[name] = module
    if not chosen:
        name, reason = next(iter(left.items()))
        raise ValueError(f"no layer can become a pair: {name}: {reason}")
    return chosen, left


def _why_no_pair(module: nn.Module) -> str | None:
    """Why no pair of linear layers can stand for this one, or None."""
    if (isinstance(module, nn.Linear) and not isinstance(module, Piece)) or is_conv1d(module):
        return _layers.why_not_prunable(module)
    kind = "part of another module" if isinstance(module, Piece) else f"a {type(module).__name__}"
    return f"it is {kind}, and a pair stands for a linear layer alone"


def _pair(
    module: nn.Module, B: Float[Tensor, "out rank"], A: Float[Tensor, "rank in"]
) -> nn.Sequential:
    """Two layers, the second with the very bias of the module."""
    grad = weight_of(module).requires_grad
    rank, in_ = A.shape
    first = nn.Linear(in_, rank, bias=False, device="meta")
    second = nn.Linear(rank, len(B), bias=False, device="meta")
    first.weight = nn.Parameter(A.contiguous(), requires_grad=grad)
    second.weight = nn.Parameter(B.contiguous(), requires_grad=grad)
    second.register_parameter("bias", module._parameters.get("bias"))
    return nn.Sequential(first, second).train(module.training)


def _put_(model: nn.Module, pairs: Mapping[str, nn.Module], undo: Undo) -> None:
    """Put each pair where its layer stands."""
    for name, pair in pairs.items():
        path, _, key = name.rpartition(".")
        parent = model.get_submodule(path)
        undo.call(parent._modules.__setitem__, key, parent._modules[key])
        parent._modules[key] = pair


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
