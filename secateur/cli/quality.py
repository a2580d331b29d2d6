"""What pruning cost, by the measures that fit the kind of model."""

from collections.abc import Sequence

from torch import Tensor, nn

from secateur.model.blocks import Batch


def quality(
    model: nn.Module, dense: nn.Module | None, batches: Sequence[Batch]
) -> dict[str, float]:
    """The measures by the names that reports print; none without batches.

    Language models: perplexity, and beside the dense model KL and the same top-1. Models that give
    hidden states: cosine to the dense model's. Others: KL and the same top-1 of their logits.
    """
    from secateur.model.evaluate import compare, embedding_cosine, perplexity

    found: dict[str, float] = {}
    if not batches:
        return found
    if is_causal(model):
        rows = [batch for batch in batches if isinstance(batch, Tensor)]
        found["perplexity"] = perplexity(model, rows).perplexity
    if dense is None:
        return found
    if gives_hidden_states(model):
        cosine = embedding_cosine(model, dense, batches)
        return {"cosine to dense": cosine.mean, "10th percentile": cosine.p10}
    agreement = compare(model, dense, batches)
    return {**found, "KL to dense": agreement.kl, "same top-1": agreement.top1}


def is_causal(model: nn.Module) -> bool:
    """Whether the model predicts next tokens, so that perplexity means something."""
    from secateur.integrations.transformers import CAUSAL_ENDINGS

    return type(model).__name__.endswith(CAUSAL_ENDINGS)


def gives_hidden_states(model: nn.Module) -> bool:
    """Whether the model is a bare encoder (`BertModel`) without a head that gives logits."""
    return type(model).__name__.endswith("Model") and not is_causal(model)


def tokens_in(batches: Sequence[Batch]) -> int:
    """How many tokens the batches hold, padding not counted."""
    return sum(_tokens(batch) for batch in batches)


def _tokens(batch: Batch) -> int:
    if isinstance(batch, Tensor):
        return batch.numel()
    assert isinstance(batch, dict), "batches of text are ids, or ids with their mask"
    return int(batch["attention_mask"].sum())
