"""The next token of each sequence by its logits: the most likely, or a drawn one."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def most_likely(logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
    """The token with the largest logit in each row, the first of several."""
    return logits.argmax(-1)


def sampled(
    logits: Float[Tensor, "batch vocab"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Int[Tensor, " batch"]:
    """A token of each row, drawn with the probabilities softmax(logits / temperature).

    Only tokens that `kept` keeps are drawn. Computed in float32.
    """
    scores = logits.float() / temperature
    probabilities = scores.masked_fill(~kept(scores, top_k, top_p), -torch.inf).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def kept(
    scores: Float[Tensor, "batch vocab"], top_k: int | None, top_p: float | None
) -> Bool[Tensor, "batch vocab"]:
    """True at the tokens that may be drawn.

    `top_k` keeps the k largest scores and whatever equals the k-th. `top_p` keeps the fewest tokens
    whose probabilities, among those left, add up to it: the most likely one at least.

    Source: transformers' TopKLogitsWarper and TopPLogitsWarper, one after the other, followed in
        their order of operations; Apache-2.0. Holtzman et al. 2020, arXiv:1904.09751, for top-p.
    """
    keep = torch.ones_like(scores, dtype=torch.bool)
    if top_k is not None:
        smallest = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
        keep = scores >= smallest
    if top_p is not None and top_p < 1:
        left = scores.masked_fill(~keep, -torch.inf)
        ascending, places = left.sort(dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False
        keep = keep & ~dropped.scatter(1, places, dropped)
    return keep
