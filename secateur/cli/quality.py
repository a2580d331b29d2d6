"""What pruning cost, by the measures that fit the kind of model, and what may be compared."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from secateur.cli.groups import Data
from secateur.integrations.transformers import CAUSAL_ENDINGS
from secateur.model.blocks import Batch
from secateur.model.evaluate import compare, embedding_cosine, perplexity


def quality(
    model: nn.Module, dense: nn.Module | None, batches: Sequence[Batch]
) -> dict[str, float]:
    """The measures, by the names that reports print; none without batches.

    Language models: perplexity, and beside the dense model KL and the same top-1. Models that give
    hidden states: cosine to the dense model's. Others: KL and the same top-1 of their logits.
    """
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
    return type(model).__name__.endswith(CAUSAL_ENDINGS)


def gives_hidden_states(model: nn.Module) -> bool:
    """Whether the model is an encoder (`BertModel`) without a head that gives logits."""
    return type(model).__name__.endswith("Model") and not is_causal(model)


def tokens_in(batches: Sequence[Batch]) -> int:
    """How many tokens the batches hold, padding not counted."""
    return sum(_tokens(batch) for batch in batches)


def names_of(folders: Sequence[Path]) -> dict[Path, str]:
    """What each folder is called beside the others: its name, or its path if two have that name.

    Raises:
        ValueError: if a folder is named twice.
    """
    twice = [folder for i, folder in enumerate(folders) if folder in folders[:i]]
    if twice:
        raise ValueError(f"{twice[0]} is named twice: name each folder once")
    own = [folder.resolve().name for folder in folders]
    return {f: str(f) if own.count(n) > 1 else n for f, n in zip(folders, own, strict=True)}


def require_one_tokenizer(folders: Sequence[Path], data: Data) -> None:
    """Check that the folders read a text as the same tokens, so that measures of it compare.

    Raises:
        ValueError: if they do not.
    """
    if data.text is None:
        return
    files = [file for folder in folders if (file := folder / "tokenizer.json").is_file()]
    others = [file for file in files if file.read_bytes() != files[0].read_bytes()]
    if others:
        raise ValueError(
            f"{others[0]} is another tokenizer than {files[0]}, so a text is other tokens to them: "
            "compare models of one tokenizer"
        )


def _tokens(batch: Batch) -> int:
    if isinstance(batch, Tensor):
        return batch.numel()
    assert isinstance(batch, dict), "batches of text are ids, or ids with their mask"
    return int(batch["attention_mask"].sum())
