"""Batches without their padding, so that no layer sees any.

An attention mask says which positions of the model's *inputs* are padding. It does not say which
rows of a layer are: experts see the tokens that are routed to them, speech encoders a row for
several input frames, decoders tokens of another sequence, of the same length by chance or not. So
nothing is guessed from shapes inside the model. The rows of a padded batch are cut to their own
tokens, and those of one length run together: whatever reaches a layer then is to be counted.
"""

import inspect
from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.model.blocks import Batch

MASK = "attention_mask"
DECODER, ENCODER = "decoder_", "encoder_"

# What is tried in turn: batches without any padding; with the inputs' but not that of what is to
# come out of a decoder, for models that take inputs of one length only, such as Whisper; whole.
SIDES: tuple[tuple[str, ...], ...] = (("", ENCODER, DECODER), (DECODER,), ())

# Of labels, where there is nothing to predict, as torch's losses and everybody's data have it.
NO_LABEL = -100


def unpadded(model: nn.Module, batch: Batch, sides: Collection[str] = SIDES[0]) -> list[Batch]:
    """The batch in parts that hold no padding; itself alone if it has none, or no mask.

    `attention_mask` is 1 at tokens, [batch, tokens]; or it has queries too, [batch, 1, tokens,
    tokens], and a token that none of them may look at is padding. It is that of the encoder or the
    only stack, and of every tensor that comes with the same tokens. What begins with `decoder_`,
    and the labels of an encoder-decoder model, follow `decoder_attention_mask`, else the labels:
    behind the last that is not -100 there is no token. `encoder_attention_mask` is that of what
    begins with `encoder_`. Rows without a token are left out. Positional arguments are known by the
    names that the model's `forward` gives them. With `sides`, the padding of others stays.

    Cost: as many calls of the model as a batch has rows of different lengths, on fewer tokens.
    """
    named = by_name(model, batch)
    if not isinstance(named, Mapping):
        return [batch]
    declared = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    known = tokens_kept(named, bool(declared) or has_decoder(named))
    kept = {side: tokens for side, tokens in known.items() if side in sides}
    if all(bool(mask.all()) for mask in kept.values()):
        return [batch]
    lengths = torch.stack([mask.sum(1).cpu() for mask in kept.values()], 1)
    parts: list[Batch] = []
    for of_part in torch.unique(lengths, dim=0):
        if bool(of_part.all()):
            rows = (lengths == of_part).all(1).nonzero().flatten()
            parts.append({key: _cut(key, x, rows, kept) for key, x in named.items()})
    return parts


def by_name(model: nn.Module, batch: Batch) -> Batch:
    """The arguments by the names in the model's `forward`; the batch where that does not say."""
    if isinstance(batch, Mapping):
        return batch
    arguments = (batch,) if isinstance(batch, Tensor) else batch
    try:
        bound = inspect.signature(model.forward).bind(*arguments)
    except (TypeError, ValueError):
        return batch
    kinds = {bound.signature.parameters[name].kind for name in bound.arguments}
    return bound.arguments if kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD} else batch


def tokens_kept(named: Mapping[str, object], decodes: bool) -> dict[str, Bool[Tensor, "..."]]:
    """True at tokens, for every sequence of which it is known, by what its names begin with.

    `decodes` says that there is a decoder behind an encoder, so that labels are those of tokens.
    """
    kept: dict[str, Tensor] = {}
    for side in ("", ENCODER, DECODER):
        mask = named.get(side + MASK)
        if isinstance(mask, Tensor) and (tokens := _tokens(mask)) is not None:
            kept[side] = tokens
    labels = named.get("labels")
    if decodes and DECODER not in kept and isinstance(labels, Tensor) and labels.dim() == 2:
        behind = (labels != NO_LABEL).flip(1).cumsum(1).flip(1)
        kept[DECODER] = behind > 0
    return kept if len({len(tokens) for tokens in kept.values()}) == 1 else {}


def has_decoder(named: Mapping[str, object]) -> bool:
    """Whether the batch has tokens of a decoder behind an encoder."""
    return any(key.startswith(DECODER) for key in named)


def _tokens(mask: Shaped[Tensor, "..."]) -> Bool[Tensor, "batch tokens"] | None:
    if mask.dim() == 2:
        return mask.bool()
    if mask.dim() != 4 or mask.shape[2] != mask.shape[3]:
        return None
    # What is added to scores is 0 where a query may look.
    seen = mask >= 0 if mask.is_floating_point() else mask.bool()
    return seen.any(dim=2).any(dim=1)


def _side(key: str, kept: Mapping[str, Tensor]) -> str:
    """Whose tokens the argument comes with."""
    if key.startswith(DECODER) or (key == "labels" and DECODER in kept):
        return DECODER
    return ENCODER if key.startswith(ENCODER) and ENCODER in kept else ""


def _cut(
    key: str, value: object, rows: Int[Tensor, " rows"], kept: Mapping[str, Bool[Tensor, "..."]]
) -> object:
    """These rows of an argument, cut to their tokens where it has these."""
    side = _side(key, kept)
    tokens = kept.get(side)
    batch = len(next(iter(kept.values())))

    def cut(x: object) -> object:
        if not isinstance(x, Tensor) or x.dim() == 0:
            return x
        if tokens is not None:
            if key == side + MASK and x.dim() == 4:
                both = [x[r][:, k][:, :, k] for r in rows for k in [tokens[r]]]
                return torch.stack(both)
            if (axes := _axes(x.shape, tokens.shape)) is not None:
                first = x.movedim(axes, (0, 1))
                first = first.expand(batch, *first.shape[1:])
                of_rows = torch.stack([first[r][tokens[r].to(x.device)] for r in rows])
                return of_rows.movedim((0, 1), axes)
        return x[rows.to(x.device)] if len(x) == batch else x

    return pytree.tree_map(cut, value)


def _axes(shape: Sequence[int], tokens: Sequence[int]) -> tuple[int, int] | None:
    """Where a tensor has rows and tokens: in front; or tokens behind, as frames of speech often."""
    batch, length = tokens
    if len(shape) > 1 and shape[0] in (1, batch) and shape[1] == length:
        return 0, 1
    behind = [i for i, size in enumerate(shape) if i > 0 and size == length]
    if shape[0] == batch and len(behind) == 1:
        return 0, behind[0]
    return (1, 2) if tuple(shape[1:]) == (batch, length) else None
