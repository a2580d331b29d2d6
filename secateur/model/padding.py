"""Batches without their padding, so that no layer sees any.

An attention mask says which positions of the model's *inputs* are padding. It does not say which
rows of a layer's input are: experts see the tokens that are routed to them, speech encoders one row
for several input frames, decoders the tokens of another sequence, whose length may happen to be the
same. So nothing is guessed from shapes inside the model. The rows of a padded batch are cut to
their own tokens, and rows of one length run together: everything that reaches a layer then counts.
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

# The sides whose padding is removed, tried in turn: all of them; only the decoder's, for models
# whose inputs must have one length, such as Whisper; none.
SIDES: tuple[tuple[str, ...], ...] = (("", ENCODER, DECODER), (DECODER,), ())

# The label of positions with nothing to predict, by the convention of torch's losses.
NO_LABEL = -100


def unpadded(model: nn.Module, batch: Batch, sides: Collection[str] = SIDES[0]) -> list[Batch]:
    """The batch in parts that hold no padding; just the batch if it has no padding, or no mask.

    `attention_mask` is 1 at tokens, [batch, tokens]; or it has queries too, [batch, 1, tokens,
    tokens], and a token that no query may attend to is padding. It applies to the encoder or the
    only stack, and to every tensor with the same tokens. Arguments that begin with `decoder_`, and
    the labels of an encoder-decoder model, follow `decoder_attention_mask`, else the labels: there
    is no token after the last one that is not -100. Arguments that begin with `encoder_` follow
    `encoder_attention_mask`. Rows without a token are left out. Positional arguments get their
    names from the model's `forward`. Padding stays on sides that are not in `sides`.

    Cost: one call of the model for each distinct length of a batch's rows, on fewer tokens.
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
    """The arguments by their names in the model's `forward`; the batch if they have none there."""
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
    """Masks that are True at tokens, for each side whose tokens are known, by the side's prefix.

    `decodes` says that a decoder follows an encoder, so that there is a label for each token.
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
    """Whether the batch has tokens for a decoder after an encoder."""
    return any(key.startswith(DECODER) for key in named)


def _tokens(mask: Shaped[Tensor, "..."]) -> Bool[Tensor, "batch tokens"] | None:
    if mask.dim() == 2:
        return mask.bool()
    if mask.dim() != 4 or mask.shape[2] != mask.shape[3]:
        return None
    # A float mask is added to the scores, and is 0 where a query may attend.
    seen = mask >= 0 if mask.is_floating_point() else mask.bool()
    return seen.any(dim=2).any(dim=1)


def _side(key: str, kept: Mapping[str, Tensor]) -> str:
    """The side whose tokens the argument has."""
    if key.startswith(DECODER) or (key == "labels" and DECODER in kept):
        return DECODER
    return ENCODER if key.startswith(ENCODER) and ENCODER in kept else ""


def _cut(
    key: str, value: object, rows: Int[Tensor, " rows"], kept: Mapping[str, Bool[Tensor, "..."]]
) -> object:
    """These rows of an argument, cut to their tokens if it has a token axis."""
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
    """The axes of rows and tokens: the first two, or tokens later, as speech frames often are."""
    batch, length = tokens
    if len(shape) > 1 and shape[0] in (1, batch) and shape[1] == length:
        return 0, 1
    behind = [i for i, size in enumerate(shape) if i > 0 and size == length]
    if shape[0] == batch and len(behind) == 1:
        return 0, behind[0]
    return (1, 2) if tuple(shape[1:]) == (batch, length) else None
