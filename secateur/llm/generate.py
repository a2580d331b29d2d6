"""The loop that writes text: prompts in, token ids out, whatever runs the steps."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from secateur.core.interrupts import putting_back
from secateur.llm.kernel_steps import steps_of, warn_of_forward
from secateur.llm.request import Request, Sampling, request
from secateur.llm.steps import Steps
from secateur.model.outputs import device_of


def generate(
    model: nn.Module,
    ids: Int[Tensor, "batch prompt"],
    *,
    max_new_tokens: int,
    mask: Int[Tensor, "batch prompt"] | Bool[Tensor, "batch prompt"] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_ids: Iterable[int] | None = None,
    told: Callable[[Int[Tensor, "batch new"]], bool | None] | None = None,
) -> Int[Tensor, "batch length"]:
    """The prompts, each followed by what the language model goes on with.

    By default every token is the most likely one, and the ids are those of transformers'
    `model.generate(do_sample=False)`. With a `temperature` tokens are drawn from
    softmax(logits / temperature): among the `top_k` largest, and among the fewest whose
    probabilities add up to `top_p`. A `seed` makes draws repeatable on one device; without it
    `torch.manual_seed` does. `top_k` and `top_p` of the model's `generation_config` are not used.

    A sequence ends with the first of `stop_ids`, by default the end-of-text tokens that the model's
    `generation_config` or `config` names (pass `()` for none), or after `max_new_tokens`. If others
    go on, it is filled up with the padding token, else with the first of `stop_ids`.

    Prompts of unlike lengths are padded on the left, with a `mask` that is 0 at padding and 1 at
    tokens. Without a mask all ids are read as tokens: padding cannot be told from them.

    `told` is called with the new tokens as they come, [batch, 1] or, where several are made at
    once, more; if it returns True, generation ends there.

    The model runs in eval mode without gradients and is left as it was. On a GPU whose kernels do
    not know the model, its own forward runs; a warning says so once, and why.

    Cost: a forward pass over the prompts, and one over a token of each for every further token;
        keys and values of all tokens in memory.
    Raises:
        ValueError: if the model keeps no keys and values, ids are not [batch, tokens] integers
            within its vocabulary, prompts and new tokens exceed its positions, the mask has padding
            elsewhere, an option makes no sense, or logits are NaN.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    asked = request(model, ids, max_new_tokens, mask=mask, sampling=sampling, stop_ids=stop_ids)
    asked = asked.to(device_of(model))
    made = [ids.long()]
    with in_eval_mode(model):
        steps = steps_of(model)
        for block in blocks(steps, asked):
            made.append(block.to(ids.device))
            warn_of_forward(model, steps)
            if told is not None and told(made[-1]) is True:
                break
    return torch.cat(made, 1)


def blocks(steps: Steps, asked: Request) -> Iterator[Int[Tensor, "batch new"]]:
    """Yield the new tokens as they come, the first one alone, until every sequence has ended."""
    choose = asked.sampling.choice(asked.ids.device)
    running = torch.ones(len(asked.ids), dtype=torch.bool, device=asked.ids.device)
    made = choose(steps.start(asked.ids, asked.mask, asked.length))[:, None]
    left = asked.count
    while True:
        block, running = _until_stops(made, running, asked)
        left -= block.shape[1]
        yield block
        if left == 0 or (asked.stop_ids and not bool(running.any())):
            return
        # What was made goes on, and not the padding shown for it, which may be no token at all.
        if asked.sampling.greedy:
            made = steps.greedy(made[:, -1], min(steps.block, left))
        else:
            made = choose(steps.step(made[:, -1]))[:, None]


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Set eval mode, without which a model drops inputs at random; restore each module's after."""
    with putting_back() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        yield


def _until_stops(
    made: Int[Tensor, "batch made"], running: Bool[Tensor, " batch"], asked: Request
) -> tuple[Int[Tensor, "batch new"], Bool[Tensor, " batch"]]:
    """The tokens with padding behind each stop, up to the last stop of all, and who goes on."""
    if not asked.stop_ids:
        return made, running
    stops = torch.tensor(asked.stop_ids, dtype=made.dtype, device=made.device)
    stop = torch.isin(made, stops).long()
    alive = running[:, None] & (stop.cumsum(1) - stop == 0)
    count = made.shape[1] if made.shape[1] == 1 else int(alive.any(0).sum())
    shown = made.masked_fill(~alive, asked.pad)[:, :count]
    return shown, running & (stop.sum(1) == 0)
