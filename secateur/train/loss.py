"""What self-distillation minimizes: the distance of a model's output from its teacher's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.model.blocks import Batch
from secateur.model.gradients import task_loss
from secateur.model.outputs import counted, divergence, hidden_of, logits_of, pooled

# (what the model returned, what the teacher returned, the batch) -> a scalar to minimize
DistillationLoss = Callable[[Any, Any, Batch], Tensor]


def output_loss(output: Any, target: Any, batch: Batch) -> Float[Tensor, ""]:
    """The distance of the output from the teacher's, by the kind of output.

    Logits: KL(teacher || model), averaged over all tokens but padding, which is all that the dense
    model knows about a token and no more. Hidden states: ||h - h_t||^2 / ||h_t||^2 over the same
    tokens, plus one minus the cosine between mean-pooled embeddings, which is what a sentence
    encoder is used for and the first term alone does not reflect. A plain tensor could be either,
    and gets the relative squared error, which suits both.

    Source: Hinton et al., arXiv:1503.02531 (logits); SquareHead, Kurtic et al., arXiv:2310.06927,
    eq. 1 (the normalised error of hidden states).
    """
    if isinstance(target, Tensor):
        student, teacher, mask = _aligned(output, target, batch, logits_of)
        return _relative_error(student, teacher, mask)
    if isinstance(getattr(target, "logits", None), Tensor):
        student, teacher, mask = _aligned(output, target, batch, logits_of)
        each = divergence(teacher, student)  # not of those that count alone: it is a GPU that knows
        return each.masked_fill(~mask, 0).sum() / mask.sum()
    student, teacher, mask = _aligned(output, target, batch, hidden_of)
    cosine = (pooled(student, mask) * pooled(teacher, mask)).sum(-1).mean()
    return _relative_error(student, teacher, mask) + 1 - cosine


@dataclass(frozen=True)
class WithTask:
    """A share of the loss of the model's task; the rest is `output_loss`.

    The task's loss is what the model computes of labels in the batch, the cross-entropy of the
    labels of a pair (inputs, labels), or for a causal language model that of the next token.
    A third is published for pruned language models.

    Raises:
        ValueError: if the share is not in (0, 1]; in training, if a batch has no such loss.
    Source: Huang et al. 2025 (AST), arXiv:2407.20584, whose KL part has two thirds.
    """

    share: float = 1 / 3

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"WithTask needs a share in (0, 1], got {self.share:g}")

    def __call__(self, output: Any, target: Any, batch: Batch) -> Float[Tensor, ""]:
        task = task_loss(output, batch)
        if task is None:
            raise ValueError(
                f"WithTask needs a loss of the task, and {type(output).__name__} has none: give "
                "the batches labels, or distil with output_loss alone"
            )
        return self.share * task + (1 - self.share) * output_loss(output, target, batch)


def _relative_error(
    student: Float[Tensor, "..."], teacher: Float[Tensor, "..."], mask: Bool[Tensor, "..."]
) -> Float[Tensor, ""]:
    error = (student[mask].float() - teacher[mask].float()).square().sum()
    # A teacher that is 0 everywhere has no scale; its error is not scaled.
    return error / teacher[mask].float().square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def _aligned(
    output: Any, target: Any, batch: Batch, tensor_of: Callable[[Any, str], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Both tensors on the model's device, and the mask of the tokens that count."""
    student = tensor_of(output, "this batch")
    teacher = tensor_of(target, "this batch of the teacher").to(student.device)
    if student.shape != teacher.shape:
        raise ValueError(
            f"distil_ needs outputs of the teacher's shape {tuple(teacher.shape)}, got "
            f"{tuple(student.shape)}: give the model that this one was pruned from"
        )
    return student, teacher, counted(batch, target, student.shape[:-1], student.device)
