"""What runs the steps of a language model: the seam between the loop that writes text and a model.

The loop asks for logits or for greedy tokens. How a step is run, by the model's own forward or by
kernels of its own, it does not know.
"""

import inspect
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.core.wrappers import adapted, unwrapped
from secateur.model.outputs import logits_of

# What a model's forward calls its key-value cache; transformers has renamed it.
CACHE_NAMES = ("cache", "past_key_values")


@runtime_checkable
class Steps(Protocol):
    """Runs a prompt, then a token of each sequence at a time, with a key-value cache.

    `block` is how many greedy tokens it makes at best between two looks at them; 1 where each
    costs a call. `about` says in a line what makes them and why, once the prompt is read.
    """

    block: int
    about: str

    def start(
        self,
        ids: Int[Tensor, "batch prompt"],
        mask: Int[Tensor, "batch prompt"] | None,
        length: int,
    ) -> Float[Tensor, "batch vocab"]:
        """The logits after the prompts, which are read into an empty cache of `length` tokens.

        `mask` is 0 at padding, which is on the left, and 1 at tokens; None where all are tokens.
        `length` counts the prompt, its padding and all new tokens.
        """
        ...

    def step(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """The logits after one more token of each sequence."""
        ...

    def greedy(self, tokens: Int[Tensor, " batch"], count: int) -> Int[Tensor, "batch count"]:
        """The `count` most likely tokens that follow these, one after the other.

        The cache then holds all of them but the last.
        """
        ...


FORWARD = "the model's own forward"


class ModelSteps:
    """Steps by the model's own forward, on any device."""

    block = 1
    about = FORWARD

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._takes = forward_parameters(model)
        self._cache_name = cache_name(model)
        self._cache: Any = None
        self._mask: Tensor | None = None
        self._seen, self._length = 0, 0

    def start(
        self,
        ids: Int[Tensor, "batch prompt"],
        mask: Int[Tensor, "batch prompt"] | None,
        length: int,
    ) -> Float[Tensor, "batch vocab"]:
        """The logits after the prompts.

        Raises: ValueError if the model gives no cache or no logits, or they are NaN.
        """
        self._cache, self._mask = None, mask
        self._seen, self._length = 0, length
        return logits_of(self._call(ids, positions_of(ids, mask)), "the prompt")[:, -1]

    def step(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """The logits after one more token of each sequence."""
        assert 0 < self._seen < self._length, f"token {self._seen} in a cache of {self._length}"
        if self._mask is None:
            positions = torch.full((1, 1), self._seen, dtype=torch.long, device=tokens.device)
        else:
            positions = self._mask.sum(1, keepdim=True)
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        logits: Tensor = self._call(tokens[:, None], positions).logits
        return logits[:, -1]

    def greedy(self, tokens: Int[Tensor, " batch"], count: int) -> Int[Tensor, "batch count"]:
        """The `count` most likely tokens that follow these, one after the other."""
        made = [tokens]
        for _ in range(count):
            made.append(self.step(made[-1]).argmax(-1))
        return torch.stack(made[1:], 1)

    @property
    def cache(self) -> Any:
        """The model's own cache of keys and values; None before a prompt was read."""
        return self._cache

    @property
    def seen(self) -> int:
        """The tokens that the cache holds."""
        return self._seen

    def forget(self) -> None:
        """Let the cache go: others have copied it."""
        self._cache, self._seen = None, 0

    def _call(self, ids: Int[Tensor, "batch new"], positions: Int[Tensor, "rows new"]) -> Any:
        given: dict[str, Any] = {"input_ids": ids, "use_cache": True}
        # As the forward takes them: a model may have no positions, or no choice of logits.
        own = {"attention_mask": self._mask, "position_ids": positions, "logits_to_keep": 1}
        given |= {n: x for n, x in own.items() if n in self._takes and x is not None}
        if self._cache is not None:
            given[self._cache_name] = self._cache
        # Not inference_mode: whatever a model keeps from a call, it may be trained with later.
        with torch.no_grad():
            output = self._model(**given)
        self._cache = getattr(output, self._cache_name, None)
        if self._cache is None:
            raise ValueError(_without_cache(self._model))
        self._seen += ids.shape[1]
        return output


def positions_of(
    ids: Int[Tensor, "batch prompt"], mask: Int[Tensor, "batch prompt"] | None
) -> Int[Tensor, "rows prompt"]:
    """Each token's position in its own prompt; 0 at padding. One row where all are alike."""
    if mask is None:
        return torch.arange(ids.shape[1], device=ids.device)[None]
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)


def forward_parameters(model: nn.Module) -> frozenset[str]:
    """The names of the arguments that the model inside all wrappers takes."""
    return frozenset(inspect.signature(adapted(unwrapped(model)).forward).parameters)


def cache_name(model: nn.Module) -> str:
    """What the model's forward calls its key-value cache.

    Raises: ValueError if it takes none.
    """
    takes = forward_parameters(model)
    found = next((name for name in CACHE_NAMES if name in takes), None)
    # A recurrent state knows no padding; models that mix it with attention count positions.
    stateful = getattr(adapted(unwrapped(model)), "_is_stateful", False)
    recurrent = stateful and "position_ids" not in takes
    if found is None or "use_cache" not in takes or recurrent:
        raise ValueError(_without_cache(model))
    return found


def _without_cache(model: nn.Module) -> str:
    return (
        f"generate needs a model that keeps keys and values of past tokens, "
        f"{type(unwrapped(model)).__name__} does not: use its own generate"
    )
