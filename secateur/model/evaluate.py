"""What pruning costs: perplexity, agreement with the dense model, embeddings, accuracy.

Every measure takes any iterable of batches and reads it once. Models run in eval mode without
gradients and are left as they were; sums are in float64.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.float64 import in_float64
from secateur.core.progress import progress
from secateur.core.shown import Shown
from secateur.model.blocks import Batch, require_iterable
from secateur.model.outputs import (
    answer,
    counted,
    divergence,
    eval_mode,
    hidden_of,
    logits_of,
    pooled,
)
from secateur.model.padding import by_name

# Logits cast to float32 at once, 256 MiB: a batch of a large vocabulary may not fit twice.
LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Perplexity(Shown):
    """The mean negative log-likelihood of the next token, in nats, and the number of tokens."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nll); infinity if that overflows."""
        return math.exp(self.nll) if self.nll < 709 else math.inf  # exp(709.8) overflows

    @property
    def paragraphs(self) -> tuple[str]:
        value = f"perplexity {self.perplexity:.4g} (nll {self.nll:.4f})"
        return (f"{value} over {self.tokens:,} tokens",)


@dataclass(frozen=True)
class Agreement(Shown):
    """How close the model's predictions are to the dense model's: `kl` in nats per token."""

    kl: float
    top1: float
    tokens: int

    @property
    def paragraphs(self) -> tuple[str]:
        close = f"KL to dense {self.kl:.4g}, same top-1 {self.top1:.2%}"
        return (f"{close}, over {self.tokens:,} tokens",)


@dataclass(frozen=True)
class Cosine(Shown):
    """Cosines between the model's and the dense model's embeddings: mean and 10th percentile."""

    mean: float
    p10: float
    count: int

    @property
    def paragraphs(self) -> tuple[str]:
        return (f"cosine to dense {self.mean:.4f} (p10 {self.p10:.4f}) over {self.count:,} rows",)


def perplexity(
    model: nn.Module,
    rows: Iterable[Tensor],
    *,
    window: int | None = None,
    stride: int | None = None,
) -> Perplexity:
    """The mean next-token negative log-likelihood of the rows, each row of ids a document.

    A row is read in windows of `window` inputs that advance by `stride` (default: the window). Each
    window counts only the tokens that none before it has: every token but a row's first counts
    exactly once. A smaller stride gives each token more context and takes longer. Without `window`,
    a row is one window.

    Cost: ceil((tokens - window - 1) / stride) + 1 forward passes for each batch of rows.
    Raises:
        ValueError: if there is no token to predict, ids are not [batch, tokens] integers, or logits
            are NaN or not one vector per token (the batch is named).
    """
    _check_windows(window, stride)
    nll, tokens = 0.0, 0
    with eval_mode(model), torch.no_grad():
        for where, batch in _named(rows, "perplexity"):
            ids = _ids(batch, where)
            for begin, end, new in _windows(ids.shape[1] - 1, window, stride):
                logits = logits_of(answer(model, ids[:, begin:end], where), where)
                targets = ids[:, begin + 1 : end + 1].to(logits.device)
                _check_targets(logits, targets, where)
                nll += _nll(logits[:, -new:].flatten(0, 1), targets[:, -new:].flatten())
                tokens += targets[:, -new:].numel()
            if not math.isfinite(nll):
                raise ValueError(
                    f"perplexity needs finite logits, {where} gives a token the probability 0: "
                    "check the weights"
                )
    if tokens == 0:
        raise ValueError("perplexity needs rows of at least 2 tokens, got only shorter ones")
    return Perplexity(nll / tokens, tokens)


def compare(model: nn.Module, dense: nn.Module, batches: Iterable[Batch]) -> Agreement:
    """How far the model's logits are from the dense model's: KL(dense || model), same top-1.

    Every position counts once, except padding according to the batch's mask or labels.

    Raises:
        ValueError: if there is no batch, or logits are NaN or differ in shape (the batch is named).
    """
    kl, same, tokens = 0.0, 0, 0
    with eval_mode(model, dense), torch.no_grad():
        for where, batch in _named(batches, "compare"):
            p, q, mask = _pair(model, dense, batch, where, logits_of)
            for one, other in zip(_chunks(p[mask]), _chunks(q[mask]), strict=True):
                kl += float(in_float64(divergence(one, other)).sum())
                same += int((one.argmax(-1) == other.argmax(-1)).sum())
            tokens += int(mask.sum())
    if tokens == 0:
        raise ValueError("compare needs at least one token that is no padding, got none")
    return Agreement(kl / tokens, same / tokens, tokens)


def embedding_cosine(model: nn.Module, dense: nn.Module, batches: Iterable[Batch]) -> Cosine:
    """How close the model's sentence embeddings are to the dense model's.

    An embedding is the mean of `last_hidden_state` (or of the output tensor) over the tokens that
    are not padding, as sentence encoders pool; an output of one vector per row is used as it is.

    Raises:
        ValueError: if there is no batch, a row is all padding, or hidden states are NaN or differ
            in shape (the batch is named).
    """
    cosines: list[Tensor] = []
    with eval_mode(model, dense), torch.no_grad():
        for where, batch in _named(batches, "embedding_cosine"):
            one, other, mask = _pair(model, dense, batch, where, hidden_of)
            if not bool(mask.flatten(1).any(1).all() if mask.dim() > 1 else True):
                raise ValueError(
                    f"embedding_cosine needs a token in every row, {where} has a row that is all "
                    "padding: leave it out"
                )
            product = in_float64(pooled(one, mask)) * in_float64(pooled(other, mask))
            cosines.append(product.sum(-1).cpu())
    every = torch.cat(cosines)
    return Cosine(float(every.mean()), float(every.quantile(0.1)), len(every))


def accuracy(model: nn.Module, batches: Iterable[tuple[Batch, Tensor]]) -> float:
    """The fraction of rows whose largest logit is their label; a batch is `(inputs, labels)`.

    Raises:
        ValueError: if there is no batch, logits are NaN, or labels are not one integer per row.
    """
    right, rows = 0, 0
    with eval_mode(model), torch.no_grad():
        for where, batch in _named(batches, "accuracy"):
            inputs, labels = _labelled(batch, where)
            logits = logits_of(answer(model, inputs, where), where)
            if logits.dim() != 2 or labels.shape != logits.shape[:1]:
                raise ValueError(
                    f"accuracy needs logits [rows, classes] and a label a row, got logits "
                    f"{tuple(logits.shape)} and labels {tuple(labels.shape)} for {where}"
                )
            right += int((logits.argmax(-1) == labels.to(logits.device)).sum())
            rows += len(labels)
    return right / rows


def _named(batches: Iterable[Any], verb: str) -> Iterator[tuple[str, Any]]:
    """Yield each batch with the words that name it; raise if there is none."""
    require_iterable(batches, verb)
    index = -1
    for index, batch in enumerate(progress(batches, verb, within=True)):
        yield f"batch {index}", batch
    if index < 0:
        raise ValueError(f"{verb} needs at least one batch, got none")


# --- perplexity ----------------------------------------------------------------------------------


def _check_windows(window: int | None, stride: int | None) -> None:
    if window is None:
        if stride is not None:
            raise ValueError(f"perplexity needs a window for stride {stride}: pass window= too")
    elif window < 1 or not 1 <= (window if stride is None else stride) <= window:
        raise ValueError(
            f"perplexity needs 1 <= stride <= window, got stride {stride} and window {window}: a "
            "larger stride would leave tokens out"
        )


def _windows(
    predictions: int, window: int | None, stride: int | None
) -> Iterator[tuple[int, int, int]]:
    """Yield `(begin, end, new)`: each window's inputs, the last `new` of which are not yet counted.

    The last window ends with the row and begins early enough to have full context.
    """
    width = predictions if window is None else window
    done = 0
    while done < predictions:
        end = min(predictions, done + (stride or width) if done else width)
        yield max(0, end - width), end, end - done
        done = end


def _ids(batch: Any, where: str) -> Int[Tensor, "batch tokens"]:
    if not isinstance(batch, Tensor) or batch.dim() != 2 or batch.is_floating_point():
        found = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch)
        raise ValueError(
            f"perplexity needs rows of token ids, an integer tensor [batch, tokens], got {found} "
            f"for {where}: give a single document as ids[None]"
        )
    return batch.long()


def _check_targets(
    logits: Float[Tensor, "..."], targets: Int[Tensor, "batch tokens"], where: str
) -> None:
    if logits.dim() != 3 or logits.shape[:2] != targets.shape:
        raise ValueError(
            f"perplexity needs logits [batch, tokens, vocabulary] for {tuple(targets.shape)} ids, "
            f"got {tuple(logits.shape)} for {where}: pass a causal language model"
        )
    if int(targets.max()) >= logits.shape[-1] or int(targets.min()) < 0:
        raise ValueError(
            f"perplexity needs ids in [0, {logits.shape[-1]}), got {int(targets.min())} to "
            f"{int(targets.max())} in {where}: use the model's own tokenizer"
        )


def _nll(logits: Float[Tensor, "tokens classes"], targets: Int[Tensor, " tokens"]) -> float:
    total, done = 0.0, 0
    for chunk in _chunks(logits):
        losses = F.cross_entropy(chunk.float(), targets[done : done + len(chunk)], reduction="none")
        total += float(in_float64(losses).sum())
        done += len(chunk)
    return total


def _chunks(logits: Float[Tensor, "tokens classes"]) -> Sequence[Tensor]:
    return torch.split(logits, max(1, LOGITS_AT_ONCE // logits.shape[-1]))


# --- two models, or labels -----------------------------------------------------------------------


def _pair(
    model: nn.Module,
    dense: nn.Module,
    batch: Batch,
    where: str,
    tensor_of: Callable[[Any, str], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The dense model's tensor and the model's, alike in shape and device, and where they count."""
    output = answer(dense, batch, where)
    reference = tensor_of(output, f"{where} of the dense model")
    found = tensor_of(answer(model, batch, where), where)
    if found.shape != reference.shape:
        raise ValueError(
            f"the models need outputs of one shape, got {tuple(found.shape)} and for the dense "
            f"model {tuple(reference.shape)} in {where}: compare a model with its own dense form"
        )
    mask = counted(by_name(dense, batch), output, found.shape[:-1], found.device)
    return reference.to(found.device), found, mask


def _labelled(batch: Any, where: str) -> tuple[Batch, Tensor]:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)
    if not pair or batch[1].is_floating_point():
        raise ValueError(
            f"accuracy needs batches of (inputs, labels), the labels an integer tensor, got "
            f"{type(batch).__name__} for {where}"
        )
    return batch[0], batch[1]
