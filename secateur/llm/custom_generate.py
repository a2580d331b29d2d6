"""The loop as transformers calls it: `model.generate(custom_generate=custom_generate)`."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from secateur.llm.generate import blocks, in_eval_mode
from secateur.llm.kernel_steps import steps_of, warn_of_forward
from secateur.llm.request import Request, Sampling, mask_of, require_generating
from secateur.llm.steps import CACHE_NAMES, Steps, positions_of
from secateur.model.outputs import device_of

# What transformers prepares for a model's forward and the steps do by themselves.
PREPARED = ("attention_mask", "position_ids", "use_cache", "logits_to_keep", *CACHE_NAMES)

# What the result would have to hold beside ids; no steps give it.
MORE_THAN_IDS = ("return_dict_in_generate", "output_attentions", "output_hidden_states")


def custom_generate(
    model: nn.Module,
    input_ids: Int[Tensor, "batch prompt"],
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Int[Tensor, "batch length"]:
    """The ids that transformers' own loop would return, made by the library's steps.

    It is for `model.generate(..., custom_generate=secateur.llm.custom_generate)`, which prepares
    the arguments: all logits processors, draws, stopping criteria and several sequences of one
    prompt work as they do there. It makes a cache of its own. transformers hands no `streamer` to
    a loop that is not its own.

    Raises:
        ValueError: if it is asked for beams, for more than ids, to go on from a cache, or for
            inputs that are no token ids.
    """
    _require_plain(generation_config, synced_gpus, model_kwargs)
    require_generating(model)
    mask = mask_of(model_kwargs.get("attention_mask"), input_ids)
    given, own = model_kwargs.get("position_ids"), positions_of(input_ids, mask)
    if given is not None and not bool((given.to(own.device) == own).all()):
        raise ValueError(
            "custom_generate counts positions by the mask, got other position_ids: leave them out"
        )
    asked = _request(model, input_ids, mask, generation_config, stopping_criteria)
    with in_eval_mode(model):
        steps = steps_of(model)
        if _needs_no_logits(generation_config, logits_processor, stopping_criteria):
            made = input_ids
            for block in blocks(steps, asked):
                made = _joined(made, block, streamer)
        else:
            made = _one_by_one(
                steps, asked, input_ids, generation_config, logits_processor, stopping_criteria,
                streamer,
            )  # fmt: skip
    warn_of_forward(model, steps)
    if streamer is not None:
        streamer.end()
    return made


def _require_plain(settings: Any, synced: bool, model_kwargs: dict[str, Any]) -> None:
    """Check that only what the loop does is asked for."""
    more = [name for name in MORE_THAN_IDS if getattr(settings, name, None)]
    if more:
        raise ValueError(f"custom_generate returns ids alone, got {more[0]}=True: leave it out")
    if (getattr(settings, "num_beams", None) or 1) > 1:
        raise ValueError(
            f"custom_generate has no beams, got num_beams={settings.num_beams}: leave out one of "
            "both"
        )
    if synced or model_kwargs.get("use_cache") is False:
        what = "synced_gpus=True" if synced else "use_cache=False"
        raise ValueError(f"custom_generate runs one process with a cache, got {what}: leave it out")
    for name in CACHE_NAMES:
        cache = model_kwargs.get(name)
        own = getattr(cache, "_is_user_defined", False)  # newer releases of transformers say
        if cache is not None and (own or cache.get_seq_length()):
            raise ValueError(
                f"custom_generate makes a cache of its own, got {name}: leave it out, and give the "
                "whole text as ids"
            )
    other = [name for name, x in model_kwargs.items() if name not in PREPARED and x is not None]
    if other:
        raise ValueError(f"custom_generate takes token ids and their mask, got {other[0]}")


def _request(
    model: nn.Module, ids: Tensor, mask: Tensor | None, settings: Any, criteria: Any
) -> Request:
    """What the settings and the criteria that transformers made of them ask for."""
    ends = [c.eos_token_id.tolist() for c in criteria if hasattr(c, "eos_token_id")]
    stops = tuple(int(stop) for some in ends for stop in some)
    pad = settings.pad_token_id
    device = device_of(model)
    return Request(
        ids.to(device),
        None if mask is None else mask.to(device),
        settings.max_length - ids.shape[1],
        Sampling(),
        stops,
        pad if pad is not None else (*stops, 0)[0],
    )


def _needs_no_logits(settings: Any, processors: Any, criteria: Any) -> bool:
    """Whether greedy tokens can be made several at once, as nothing looks at their logits."""
    known = all(hasattr(c, "eos_token_id") or hasattr(c, "max_length") for c in criteria)
    return known and not settings.do_sample and not len(processors)


def _one_by_one(
    steps: Steps,
    asked: Request,
    ids: Tensor,
    settings: Any,
    processors: Any,
    criteria: Any,
    streamer: Any,
) -> Tensor:
    """The ids with every token chosen from processed logits, until the criteria say stop."""
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    logits = steps.start(asked.ids, asked.mask, asked.length)
    while True:
        scores = processors(ids, logits.to(device=ids.device, dtype=torch.float32))
        if settings.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        else:
            tokens = scores.argmax(-1)
        shown = torch.where(running, tokens, asked.pad) if asked.stop_ids else tokens
        ids = _joined(ids, shown[:, None], streamer)
        running &= ~criteria(ids, None)
        if not bool(running.any()):
            return ids
        logits = steps.step(tokens.to(asked.ids.device))


def _joined(ids: Tensor, block: Tensor, streamer: Any) -> Tensor:
    """The ids and what follows them; the streamer gets it token by token, as it expects."""
    if streamer is not None:
        for tokens in block.cpu().unbind(1):
            streamer.put(tokens)
    return torch.cat([ids, block.to(ids.device)], 1)
