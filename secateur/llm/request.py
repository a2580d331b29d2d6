"""What is asked of the loop, checked in one place before anything runs."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.core.wrappers import adapted, unwrapped
from secateur.llm.sampling import most_likely, sampled
from secateur.llm.steps import cache_name, forward_parameters
from secateur.model.padding import MASK

Choice = Callable[[Float[Tensor, "batch vocab"]], Int[Tensor, " batch"]]

# Seeds are what torch's generators take.
SEEDS = 2**63

# Logits divided by less may overflow, and a draw from what then is no distribution ends in an
# assertion on the GPU, after which a process can do nothing more there.
LEAST_TEMPERATURE = 1e-5

# Settings of a model's generation_config that change what is most likely, each with the values
# that change nothing.
NOT_APPLIED: Mapping[str, tuple[object, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "guidance_scale": (1.0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
}


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the most likely at temperature 0, else drawn.

    `top_k` and `top_p` leave out unlikely tokens before the draw, `top_k` first. Without a `seed`
    torch's own generator draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether it takes the most likely token."""
        return self.temperature == 0

    def choice(self, device: torch.device) -> Choice:
        """What chooses a token of each sequence, by logits on the device."""
        if self.greedy:
            return most_likely
        generator = None
        if self.seed is not None:
            generator = torch.Generator(device).manual_seed(self.seed)
        return lambda logits: sampled(logits, self.temperature, self.top_k, self.top_p, generator)


@dataclass(frozen=True)
class Request:
    """Prompts and how to go on with them. A sequence that has ended is filled with `pad`."""

    ids: Int[Tensor, "batch prompt"]
    mask: Int[Tensor, "batch prompt"] | None
    count: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    pad: int

    def to(self, device: torch.device) -> "Request":
        """The same with its tensors on the device."""
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, ids=self.ids.to(device), mask=mask)

    @property
    def length(self) -> int:
        """Tokens of a sequence at most: its padding, its prompt and the new ones."""
        return self.ids.shape[1] + self.count


def request(
    model: nn.Module,
    ids: Int[Tensor, "batch prompt"],
    count: int,
    *,
    mask: Tensor | None = None,
    sampling: Sampling | None = None,
    stop_ids: Iterable[int] | None = None,
) -> Request:
    """The request for `count` more tokens after the ids, on their device.

    Warns about settings of the model's `generation_config` that would not be applied.

    Raises:
        ValueError: if the model has no key-value cache, the ids are no prompts for it, there are
            more tokens than it has positions, or an argument makes no sense.
    """
    sampling = sampling or Sampling()
    require_generating(model)
    vocabulary = _number(model, "vocab_size")
    _require_ids(ids, vocabulary)
    prompt = mask_of(mask, ids)
    if prompt is not None and MASK not in forward_parameters(model):
        raise ValueError(
            f"{type(unwrapped(model)).__name__} takes no {MASK}, got prompts with padding: give "
            "one prompt at a time, or several of one length"
        )
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"max_new_tokens needs to be at least 1, got {count}: pass 1 or more")
    _require_positions(model, ids.shape[1] if prompt is None else int(prompt.sum(1).max()), count)
    _require_sampling(sampling)
    own, pad = special_tokens(model)
    stops = own if stop_ids is None else _stops(stop_ids, vocabulary)
    _warn_of_settings(model)
    return Request(
        ids.long(),
        prompt,
        count,
        sampling,
        stops,
        pad if pad is not None else (*stops, 0)[0],
    )


def require_generating(model: nn.Module) -> None:
    """Check that the model can go on with text token by token, with a cache.

    Raises: ValueError if it cannot.
    """
    cache_name(model)
    takes = forward_parameters(model)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or "input_ids" not in takes:
        raise ValueError(
            f"generate needs a decoder of token ids, {type(unwrapped(model)).__name__} is none: "
            "use its own generate"
        )


def mask_of(
    mask: Tensor | None, ids: Int[Tensor, "batch prompt"]
) -> Int[Tensor, "batch prompt"] | None:
    """The mask as integers; None where every position is a token.

    Raises: ValueError if it is not 0 at padding on the left and 1 at tokens.
    """
    if mask is None:
        return None
    if mask.shape != ids.shape:
        raise ValueError(
            f"mask needs the shape of ids, {list(ids.shape)}, got {list(mask.shape)}: give each "
            "token a 1, and each padding a 0"
        )
    tokens = mask.long()
    wrong = ((tokens != mask) | (tokens < 0) | (tokens > 1)).any(1)
    wrong |= (tokens[:, 1:] < tokens[:, :-1]).any(1) | (tokens[:, -1] == 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"mask needs 0 at padding on the left and 1 at tokens up to the end, row {row} is "
            f"{_shortened(mask[row].tolist())}: pad on the left"
        )
    return None if bool(tokens.all()) else tokens


def special_tokens(model: nn.Module) -> tuple[tuple[int, ...], int | None]:
    """The model's end-of-text tokens and its padding token.

    They are those of its `generation_config`, else those of its `config`.
    """
    stock: Any = adapted(unwrapped(model))
    where = getattr(stock, "generation_config", None) or getattr(stock, "config", None)
    ends = getattr(where, "eos_token_id", None)
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    pad = getattr(where, "pad_token_id", None)
    return tuple(int(end) for end in ends if end is not None), pad


def positions(model: nn.Module) -> int | None:
    """How many tokens a text may have, as far as the model's config limits it."""
    rope = getattr(_text_config(model), "rope_parameters", None) or {}
    if "dynamic" in (rope.get("rope_type"), rope.get("type")):
        return None  # it grows with the text
    return _number(model, "max_position_embeddings")


# --- what is wrong with them ---------------------------------------------------------------------


def _require_ids(ids: Tensor, vocabulary: int | None) -> None:
    if not isinstance(ids, Tensor):
        raise ValueError(
            f"generate needs ids [batch, tokens], an integer tensor, got {type(ids).__name__}: "
            "make a tensor of a list of rows, or take .input_ids of what a tokenizer returns"
        )
    integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool)
    if ids.dim() != 2 or not integer:
        raise ValueError(
            f"generate needs ids [batch, tokens], an integer tensor, got {ids.dtype} "
            f"{list(ids.shape)}: give a single prompt as ids[None]"
        )
    if not ids.numel():
        raise ValueError(
            f"generate needs a prompt of at least 1 token, got ids of shape {list(ids.shape)}: "
            "begin with the token that begins a text"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        end = "..." if vocabulary is None else vocabulary
        raise ValueError(
            f"generate needs ids in [0, {end}), got {low} to {high}: use the model's own tokenizer"
        )


def _require_positions(model: nn.Module, prompt: int, count: int) -> None:
    """`prompt` is the length of the longest prompt without padding."""
    limit = positions(model)
    if limit is None or prompt + count <= limit:
        return
    if prompt >= limit:
        raise ValueError(
            f"the model has {limit:,} positions, the prompt alone has {prompt:,} tokens: shorten it"
        )
    raise ValueError(
        f"the model has {limit:,} positions, got a prompt of {prompt:,} tokens and "
        f"max_new_tokens={count}: pass max_new_tokens={limit - prompt} at most, or shorten the "
        "prompt"
    )


def _require_sampling(sampling: Sampling) -> None:
    temperature, top_k, top_p = sampling.temperature, sampling.top_k, sampling.top_p
    if not (math.isfinite(temperature) and (temperature == 0 or temperature >= LEAST_TEMPERATURE)):
        raise ValueError(
            f"temperature needs to be 0, or {LEAST_TEMPERATURE} or more, got {temperature}: pass 0 "
            "for the most likely token, 1 for the model's own distribution"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k needs to be at least 1, got {top_k}: leave it out to keep all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p needs to be in (0, 1], got {top_p}: leave it out to keep all")
    if sampling.greedy and not (top_k is None and top_p is None):
        raise ValueError(
            f"top_k and top_p are for draws, got {top_k} and {top_p} with temperature 0, which "
            "draws nothing: pass temperature=1.0 too, or leave them out"
        )
    if sampling.seed is not None and not 0 <= sampling.seed < SEEDS:
        raise ValueError(f"seed needs to be in [0, 2**63), got {sampling.seed}: take another")


def _stops(stop_ids: Iterable[int], vocabulary: int | None) -> tuple[int, ...]:
    if isinstance(stop_ids, int):
        raise ValueError(f"stop_ids needs ids in a list, got {stop_ids}: pass [{stop_ids}]")
    stops = tuple(map(int, stop_ids))
    for stop in stops:
        if stop < 0 or (vocabulary is not None and stop >= vocabulary):
            raise ValueError(
                f"stop_ids need to be in [0, {vocabulary or '...'}), got {stop}: use the model's "
                "own tokenizer"
            )
    return stops


def _warn_of_settings(model: nn.Module) -> None:
    settings = getattr(adapted(unwrapped(model)), "generation_config", None)
    asked = {name: getattr(settings, name, None) for name in NOT_APPLIED}
    told = [
        f"{name}={value}"
        for name, value in asked.items()
        if value is not None and value not in NOT_APPLIED[name]
    ]
    if told:
        warnings.warn(
            f"generate does not apply {', '.join(told)} of the model's generation_config: use "
            "model.generate(custom_generate=secateur.llm.custom_generate), which does",
            stacklevel=4,
        )


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    of_text = getattr(config, "get_text_config", None)
    return config if of_text is None else of_text(decoder=True)


def _number(model: nn.Module, name: str) -> int | None:
    """A number of the model's config, if it says it."""
    found = getattr(_text_config(model), name, None)
    return found if isinstance(found, int) else None


def _shortened(row: list[Any]) -> str:
    return str(row) if len(row) <= 8 else f"[{', '.join(map(str, row[:8]))}, ...]"
