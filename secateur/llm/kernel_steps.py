"""Steps by kernels of our own where they know the model, else by the model's own forward."""

import warnings
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.core.wrappers import adapted, unwrapped
from secateur.formats.kernels.decode_step import why_no_attention
from secateur.formats.kernels.decode_step.between import MOST_WIDTH, PIECE
from secateur.formats.kernels.gpu import on
from secateur.llm.decoder import Decoder, NotRead, read_decoder
from secateur.llm.plan import Memory, Plan
from secateur.llm.prompt import Prompts
from secateur.llm.steps import FORWARD, ModelSteps, Steps
from secateur.model.outputs import device_of

SLOTS = 256  # a cache has a multiple of them, so that few plans serve all lengths
OWN = "kernels of its own, one CUDA graph a token"

State = tuple[tuple[int, int], ...]


@dataclass
class Planned:
    """A plan, and of what: the addresses and versions of all tensors that its launches read.

    In place of the plan there is a reason where the model turned out to compute something else, or
    this GPU to take no such kernels. `prompts` reads prompts, if it has given the model's own
    logits for the first that it was `tried` with.
    `text` stands for the one in the plan's memory; no reference to a model, which would keep it
    alive.
    """

    state: State
    plan: Plan | str
    prompts: Prompts | None = None
    tried: bool = False
    text: object = None


_warned: WeakSet[nn.Module] = WeakSet()
_plans: WeakKeyDictionary[nn.Module, Planned] = WeakKeyDictionary()


class KernelSteps:
    """Reads a prompt by `Prompts`, then makes tokens by a captured `Plan`.

    The first prompt is read by the model's forward, too, and one step made; where logits differ by
    more than roundings do, or the model is not known, the model's forward goes on. `about` says
    which it is and why. Prompts with padding are always read by the model's forward.
    """

    block = 16

    def __init__(self, model: nn.Module) -> None:
        self._model, self._forward = model, ModelSteps(model)
        self._planned: Planned | None = None
        self._text, self._seen = object(), 0
        self.about = FORWARD

    def start(
        self,
        ids: Int[Tensor, "batch prompt"],
        mask: Int[Tensor, "batch prompt"] | None,
        length: int,
    ) -> Float[Tensor, "batch vocab"]:
        """The logits after the prompts.

        Raises: ValueError if the model gives no cache or no logits, or they are NaN.
        """
        self._planned, self._text, self._seen = None, object(), ids.shape[1]
        plain = mask is None or bool(mask.all())
        kept = self._kept(len(ids), length)
        if kept is not None and plain and (logits := self._read(kept, ids)) is not None:
            self._goes_on_by(kept)
            return logits
        logits = self._forward.start(ids, mask, length)
        try:
            planned, plan = kept, kept.plan if kept is not None else self._new(len(ids), length)
            assert isinstance(plan, Plan)
            _fill(plan.memory, self._forward.cache, ids.shape[1], mask)
            if planned is None:
                planned = self._compared(plan, logits)
        except (NotRead, RuntimeError) as problem:
            self.about = f"{FORWARD}: {str(problem).splitlines()[0]}"
            if self._forward.seen > ids.shape[1]:  # the step that was compared stands in the cache
                self._forward.start(ids, mask, length)
            return logits
        if plain and not planned.tried:
            _try_prompts(planned, ids, logits)
        self._goes_on_by(planned)
        self._forward.forget()
        return logits

    def step(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """The logits after one more token of each sequence.

        Raises: RuntimeError if another text of the same model has been begun since.
        """
        if self._planned is None:
            return self._forward.step(tokens)
        return self._run(tokens, 1).logits.clone()

    def greedy(self, tokens: Int[Tensor, " batch"], count: int) -> Int[Tensor, "batch count"]:
        """The `count` most likely tokens that follow these, one after the other.

        Raises: RuntimeError if another text of the same model has been begun since.
        """
        if self._planned is None:
            return self._forward.greedy(tokens, count)
        made = self._run(tokens, count).history
        return made[self._seen - count : self._seen].t().clone()

    def _run(self, tokens: Tensor, count: int) -> Memory:
        """Make so many steps; the memory that has their results."""
        assert self._planned is not None and isinstance(self._planned.plan, Plan)
        plan, memory = self._planned.plan, self._planned.plan.memory
        if self._planned.text is not self._text:
            raise RuntimeError(
                "this text's keys and values are gone: another one was begun with the same model, "
                "whose GPU kernels have one cache; write one text after the other, or as a batch"
            )
        after = self._seen + count
        assert after <= memory.slots, f"token {after} in a cache of {memory.slots}"
        memory.tokens.copy_(tokens)
        with on(plan.decoder.device):
            for _ in range(count):
                plan.run()
        self._seen = after
        return memory

    def _goes_on_by(self, planned: Planned) -> None:
        planned.text, self._planned, self.about = self._text, planned, OWN

    def _read(self, kept: Planned, ids: Tensor) -> Tensor | None:
        """The logits after prompts that kernels have read; None where the forward has to."""
        prompts, plan = kept.prompts, kept.plan
        if prompts is None or not prompts.takes(ids.shape[1]):
            return None
        assert isinstance(plan, Plan)
        with on(plan.decoder.device):
            logits = prompts.read(ids, plan.memory)
        return None if bool(logits.isnan().any()) else logits  # of NaN the forward says what it is

    def _kept(self, batch: int, length: int) -> Planned | None:
        """What is kept of this model as it is now, if it serves such texts."""
        kept = _plans.get(self._model)
        if kept is None or isinstance(kept.plan, str):
            return None
        memory = kept.plan.memory
        if len(memory.tokens) != batch or memory.slots < length:
            return None
        try:
            state = _state(read_decoder(self._inner()))
        except NotRead:  # it was changed since
            return None
        return kept if kept.state == state else None

    def _new(self, batch: int, length: int) -> Plan:
        """A plan for a batch of texts of this length.

        Raises: NotRead where there can be none.
        """
        decoder = read_decoder(self._inner())
        if (problem := why_no_plan(decoder)) is not None:
            raise NotRead(problem)
        kept = _plans.pop(self._model, None)
        if kept is not None and isinstance(kept.plan, str) and kept.state == _state(decoder):
            _plans[self._model] = kept
            raise NotRead(kept.plan)
        del kept  # its memory is free for the new one's
        try:
            return Plan.of(decoder, Memory.of(decoder, batch, -(-length // SLOTS) * SLOTS))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:  # a kernel that this GPU does not take, most likely
            _plans[self._model] = Planned(_state(decoder), str(problem).splitlines()[0])
            raise

    def _inner(self) -> nn.Module:
        return adapted(unwrapped(self._model))

    def _compared(self, plan: Plan, logits: Tensor) -> Planned:
        """The plan, to be kept, once a step of it has given the model's own logits.

        Raises: NotRead if they differ by more than roundings; that is kept, too.
        """
        tokens, memory = logits.argmax(-1), plan.memory
        wanted = self._forward.step(tokens).float()
        memory.tokens.copy_(tokens)
        with on(plan.decoder.device):
            plan.run()
        memory.position.fill_(self._seen)
        error = float((memory.logits.float() - wanted).norm() / wanted.norm())
        most, state = allowed(plan.decoder), _state(plan.decoder)
        if not error <= most:
            problem = (
                f"its first step's logits differ by {error:.1e} from those of the kernels, where "
                f"roundings make {most:.1e} at most: it has a part that is not known here"
            )
            _plans[self._model] = Planned(state, problem)
            raise NotRead(problem)
        _plans[self._model] = planned = Planned(state, plan)
        return planned


def steps_of(model: nn.Module) -> Steps:
    """What runs the model's steps: kernels, once they have proved equal, on a GPU; else itself."""
    return KernelSteps(model) if device_of(model).type == "cuda" else ModelSteps(model)


def warn_of_forward(model: nn.Module, steps: Steps) -> None:
    """Warn, once for a model on a GPU, that its steps run by its own forward, and why."""
    by_forward = steps.about.startswith(FORWARD) and device_of(model).type == "cuda"
    if by_forward and model not in _warned:
        _warned.add(model)
        why = steps.about.removeprefix(FORWARD).removeprefix(": ")
        warnings.warn(
            f"generate runs {FORWARD}, not the GPU kernels: {why}",
            stacklevel=3,
        )


def allowed(decoder: Decoder) -> float:
    """The relative difference of logits that roundings can make.

    Two forwards in 16 bits round each block's two sums and what leads to them at other places; the
    errors are independent, so they grow with the root of the number of blocks.
    """
    return float(2 * torch.finfo(decoder.dtype).eps * len(decoder.blocks) ** 0.5)


def why_no_plan(decoder: Decoder) -> str | None:
    """Why the kernels cannot run a step of this decoder here, or None."""
    if decoder.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels of a step run bfloat16 and float16, it has {decoder.dtype}"
    devices = {str(tensor.device) for tensor in decoder.tensors()}
    if len(devices) > 1:
        return f"its parameters are on {', '.join(sorted(devices))}: a step runs on one GPU"
    inner = [block.inner for block in decoder.blocks]
    if any(n % PIECE for n in (decoder.width, *inner)) or decoder.width > MOST_WIDTH:
        return f"the kernels need widths of whole {PIECE}s, {MOST_WIDTH} at most"
    problems = (why_no_attention(block.attention, decoder.device) for block in decoder.blocks)
    return next((problem for problem in problems if problem is not None), None)


def _try_prompts(planned: Planned, ids: Tensor, logits: Tensor) -> None:
    """Let kernels read later prompts if they give these logits after these, but for roundings."""
    plan = planned.plan
    assert isinstance(plan, Plan)
    prompts = Prompts.of(plan.decoder)
    if not prompts.takes(ids.shape[1]):
        return
    planned.tried, wanted = True, logits.float()
    try:
        with on(plan.decoder.device):
            found = prompts.read(ids, plan.memory).float()
    except torch.OutOfMemoryError:
        planned.tried = False
    except RuntimeError:  # a kernel that this GPU does not take: the forward reads on
        return
    else:
        error = float((found - wanted).norm() / wanted.norm())
        planned.prompts = prompts if error <= allowed(plan.decoder) else None


def _state(decoder: Decoder) -> State:
    return tuple((tensor.data_ptr(), tensor._version) for tensor in decoder.tensors())


def _fill(memory: Memory, cache: Any, prompt: int, mask: Tensor | None) -> None:
    """Copy the prompt's keys and values, and set where the next token stands.

    Raises: NotRead if the cache is of another kind, or has not all of the prompt.
    """
    layers = getattr(cache, "layers", ())
    if len(layers) != len(memory.keys):
        raise NotRead(f"its cache is a {type(cache).__name__} with {len(layers)} layers of keys")
    for layer, keys, values in zip(layers, memory.keys, memory.values, strict=True):
        if layer.keys.shape[2] != prompt:
            raise NotRead(f"its cache keeps {layer.keys.shape[2]} of {prompt} tokens of the prompt")
        keys[:, :, :prompt].copy_(layer.keys)
        values[:, :, :prompt].copy_(layer.values)
    memory.position.fill_(prompt)
    memory.padding.copy_(
        (mask == 0).sum(1) if mask is not None else torch.zeros_like(memory.padding)
    )
