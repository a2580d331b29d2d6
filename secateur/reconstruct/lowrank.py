"""Low-rank compensation: a product of two thin matrices that restores what pruning lost of a layer.

Symbols: `W` the dense weight, `S` the sparse one, `E = W - S`, `H = G + damping mean(diag G) I`.
The B A of rank r with the least tr (E - B A) H (E - B A)^T is the truncated SVD of E H^(1/2),
mapped back by H^(-1/2) (Eckart and Young). With U its first r left singular vectors that is
U U^T E, so B = U and A = U^T E: neither root is needed, nothing is inverted, and inputs that were
never active do no harm. U are the eigenvectors of E H E^T, in the space of E's columns.
Source: EoRA, Liu et al. 2024, arXiv:2410.21271.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.float64 import in_float64
from secateur.core.interrupts import putting_back
from secateur.core.progress import bar
from secateur.core.shown import Shown, Table
from secateur.core.wrappers import unwrapped
from secateur.model import layers as _layers
from secateur.model.blocks import Batch, input_of
from secateur.model.calibrate import observe
from secateur.model.piece import Piece, is_expert, parameter_name
from secateur.reconstruct.peft import require_new, write_adapter
from secateur.reconstruct.refit import require_gram


def compensation(
    weight: Float[Tensor, "out in"],
    sparse: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    rank: int,
    damping: float = 0.01,
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """The factors B, A of the least tr (W - S - B A) H (W - S - B A)^T, B with orthonormal columns.

    What remains is the sum of the squared singular values of (W - S) H^(1/2) after the first
    `rank`. Since B A is a projection of W - S, no output error grows, whatever the inputs. It is
    computed in float64 and returned in the weight's dtype.

    Cost: out in (out + in) time and the eigenvectors of a matrix of min(out, in) rows.
    Raises:
        ValueError: if the rank is not from 1 to min(out, in), the damping is negative, or the Gram
            matrix is not finite or has a negative diagonal.
    Source: EoRA, arXiv:2410.21271; damping as in SparseGPT, arXiv:2301.00774.
    """
    if not 1 <= rank <= min(weight.shape):
        out, in_ = weight.shape
        raise ValueError(f"a {out} x {in_} weight takes a rank of 1 to {min(out, in_)}, got {rank}")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be a number of at least 0, got {damping:g}: 0.01 is usual")
    require_gram(gram)
    H = in_float64(gram).clone()
    H.diagonal().add_(damping * H.diagonal().mean())
    Q, R = torch.linalg.qr(in_float64(weight) - in_float64(sparse))
    _, V = torch.linalg.eigh(R @ H @ R.T)  # ascending
    V = V[:, -rank:].flip(1)
    return (Q @ V).to(weight), (V.T @ R).to(weight)


@dataclass(frozen=True)
class Compensated:
    """What became of one layer.

    `extra` counts the parameters of both factors. The errors are shares of the dense layer's output
    energy, ||(W - S) X||^2 / ||W X||^2 without and with B A added to S, on the calibration inputs.
    """

    layer: str
    extra: int
    error_before: float
    error: float
    tokens: int


@dataclass(frozen=True)
class CompensationReport(Shown):
    """What `compensate` wrote, layer by layer, with its parameters counted.

    `parameters` counts the pruned model's with the zeros, `nonzeros` without.
    """

    rank: int
    layers: tuple[Compensated, ...]
    parameters: int
    nonzeros: int
    seconds: float

    @property
    def extra(self) -> int:
        """The adapter's parameters."""
        return sum(layer.extra for layer in self.layers)

    @property
    def columns(self) -> tuple[str, ...]:
        return ("layer", "extra parameters", "output error before", "after", "tokens")

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (r.layer, f"{r.extra:,}", f"{r.error_before:.4f}", f"{r.error:.4f}", f"{r.tokens:,}")
            for r in self.layers
        ]

    @property
    def paragraphs(self) -> tuple[str | Table, ...]:
        return (
            Table(self.columns, self.rows()),
            f"rank {self.rank}: {len(self.layers)} layers in {self.seconds:.1f} s, {self.extra:,} "
            f"extra parameters, {self.extra / self.parameters:.2%} of the model's "
            f"{self.parameters:,} and {self.extra / self.nonzeros:.2%} of its {self.nonzeros:,} "
            "nonzeros",
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"extra": self.extra}


@torch.inference_mode(False)
def compensate(
    model: nn.Module,
    dense: nn.Module | Mapping[str, Tensor],
    batches: Iterable[Batch],
    folder: str | Path,
    *,
    rank: int | None = None,
    extra: float | None = None,
    damping: float = 0.01,
    offload: bool = False,
) -> CompensationReport:
    """Write a LoRA adapter for PEFT that makes up for what the pruned model's layers lost.

    Every layer whose weight differs from the dense model's (or its state dict's) gets factors of
    the same rank: `rank`, or the largest for which they have at most the share `extra` of the
    model's parameters, zeros included. Layers are taken in the order in which they run, each on the
    outputs of the pruned layers and factors before it, as with the adapter attached. The model does
    not change. The factors have the weights' dtype. Attach the adapter, do not merge it: a merged
    weight has no zeros. `offload` keeps activations between blocks on the CPU.

    Cost: `compensation` once per layer; memory as in `reconstruct_` with a Gram matrix.
    Raises:
        ValueError: before anything is written, if the folder exists, no layer differs, one is
            missing from the dense model, has another shape there or cannot be compensated, the rank
            does not suit a layer, or the model cannot run the batches.
    Source: EoRA, Liu et al. 2024, arXiv:2410.21271.
    """
    begin = time.perf_counter()
    require_new(Path(folder))
    model = unwrapped(model)
    weights = _lost(model, unwrapped(dense) if isinstance(dense, nn.Module) else dense)
    layers = {name: model.get_submodule(name) for name in weights}
    parameters = sum(p.numel() for p in model.parameters())
    nonzeros = sum(int(p.count_nonzero()) for p in model.parameters())
    rank = rank_within({n: w.shape for n, w in weights.items()}, parameters, rank, extra)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    results: dict[str, Compensated] = {}
    with torch.no_grad(), putting_back() as stack:
        shown = stack.enter_context(bar("compensate", len(layers), unit="layer"))
        seen = observe(model, layers, batches, ["gram"], sequential=True, offload=offload)
        stack.enter_context(contextlib.closing(seen))
        for observed in seen:
            for name, statistics in observed.statistics.items():
                module, gram = layers[name], statistics["gram"]
                B, A, before, after = _compensated(weights[name], module, gram, rank, damping)
                factors[name] = B, A
                hook = module.register_forward_hook(adding(B, A), with_kwargs=True)
                stack.callback(hook.remove)
                tokens = observed.tokens[name]
                results[name] = Compensated(name, B.numel() + A.numel(), before, after, tokens)
                shown.update()
    write_adapter(
        Path(folder),
        {name: factors[name] for name in layers},
        [name for name, _ in model.named_modules()],
        task_type=_task(model),
        transposed=not all(isinstance(module, nn.Linear) for module in layers.values()),
    )
    in_order = tuple(results[name] for name in layers)
    return CompensationReport(rank, in_order, parameters, nonzeros, time.perf_counter() - begin)


def _compensated(
    dense: Float[Tensor, "out in"],
    module: nn.Module,
    gram: Float[Tensor, "in in"],
    rank: int,
    damping: float,
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"], float, float]:
    """The factors of a layer in its dtype, and its error without and with them."""
    S = _layers.matrix(module)
    W = in_float64(dense.to(S.device))
    B, A = (factor.to(S) for factor in compensation(W, S, gram, rank, damping))
    before, after = output_errors(W, in_float64(S), in_float64(B) @ in_float64(A), gram)
    return B, A, before, after


def _lost(
    model: nn.Module, dense: nn.Module | Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "out in"]]:
    """The dense weights, as matrices, of the layers whose weight has changed since."""
    weights = dense.state_dict() if isinstance(dense, nn.Module) else dense
    lost: dict[str, Tensor] = {}
    for name, module in _layers.layers_of(model).items():
        now = _layers.weights_of({name: module}, written=False)[name]
        before = weights.get(parameter_name(name, module))
        if before is not None:
            before = _layers.weight_in(module, before)
        if before is None or before.shape != now.shape:
            found = "none" if before is None else f"one of {tuple(before.shape)}"
            raise ValueError(
                f"{name}.weight is {tuple(now.shape)} and the dense model has {found}: pass the "
                "model as it was before it was pruned"
            )
        if torch.equal(before.to(now), now):
            continue
        if reason := why_not_compensated(module):
            raise ValueError(f"{name} was pruned and cannot be compensated: {reason}")
        if not (before.isfinite().all() and now.isfinite().all()):
            raise ValueError(f"{name}.weight holds NaN or infinite values: repair or reload it")
        lost[name] = _layers.matrix(module, before.detach())
    if not lost:
        raise ValueError("no weight differs from the dense model's: prune the model first")
    return lost


def why_not_compensated(module: nn.Module) -> str | None:
    """Why a LoRA adapter of matrices cannot be added to this module, or None."""
    if isinstance(module, (nn.Conv2d, nn.Embedding)):
        kind = "a Conv2d" if isinstance(module, nn.Conv2d) else "an Embedding"
        return f"it is {kind}, the adapter is for linear layers: leave it out of the plan"
    if isinstance(module, Piece):
        kind = "an expert in a 3-D parameter" if is_expert(module) else "part of another module"
        return f"it is {kind}, no linear layer: leave it out of the plan"
    return _layers.why_not_prunable(module)


def rank_within(
    shapes: Mapping[str, torch.Size], parameters: int, rank: int | None, extra: float | None
) -> int:
    """The rank of all layers: the given one, or the largest within the share.

    Raises:
        ValueError: if both are given or neither, or the rank does not suit a layer.
    """
    if rank is None and extra is None:
        raise ValueError("an adapter needs a rank, got none: pass rank=16, or extra=0.05")
    if rank is not None and extra is not None:
        raise ValueError(f"extra={extra:g} chooses the rank, got rank={rank} too: pass one of them")
    if extra is not None:
        each = sum(sum(shape) for shape in shapes.values())
        # The decimal as written: in floating point 0.29 * 100 is less than 29.
        share = Fraction(str(extra)) if math.isfinite(extra) else Fraction(0)
        if share * parameters < each:
            raise ValueError(
                f"extra needs a share of {each / parameters:.2%}, rank 1 for {len(shapes)} layers, "
                f"got {extra:g}: raise it, or prune fewer layers"
            )
        rank = int(share * parameters // each)
    assert rank is not None
    for name, shape in shapes.items():
        if not 1 <= rank <= min(shape):
            raise ValueError(
                f"{name} is {shape[0]} x {shape[1]} and takes a rank of 1 to {min(shape)}, got "
                f"{rank}: pass another, or leave the layer dense"
            )
    return rank


def adding(B: Tensor, A: Tensor) -> Callable[[nn.Module, Any, Any, Tensor], Tensor]:
    """A forward hook with keywords that adds B A x to the layer's output, as PEFT does."""

    def after(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return output + F.linear(F.linear(input_of(args, kwargs), A), B)

    return after


def output_errors(
    W: Float[Tensor, "out in"],
    S: Float[Tensor, "out in"],
    BA: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
) -> tuple[float, float]:
    """The share of the output energy lost without the correction, and with it."""
    G = in_float64(gram)
    energy, before, after = (float(((X @ G) * X).sum()) for X in (W, W - S, W - S - BA))
    return (before / energy, after / energy) if energy > 0 else (0.0, 0.0)


def _task(model: nn.Module) -> str | None:
    """PEFT's task type of the model, named only for causal language models, where it matters."""
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return "CAUSAL_LM" if causal else None
