"""Steps by kernels: the logits of the model's own forward, and when they are not used."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.formats.pack import linears_of
from secateur.llm import custom_generate, kernel_steps
from secateur.llm.decoder import Decoder, NotRead, read_decoder
from secateur.llm.kernel_steps import OWN, KernelSteps
from secateur.llm.plan import Memory, Plan
from secateur.llm.prompt import Prompts
from secateur.llm.steps import FORWARD, ModelSteps

transformers = pytest.importorskip("transformers")

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def model_of(family: str, device: str, **others: object) -> nn.Module:
    kind = getattr(transformers, f"{family}Config")
    head = {} if family in ("Phi3", "Llama", "Mistral") else {"head_dim": 64}
    config = kind(**{**SIZES, "pad_token_id": 0, **head, **others})
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(2)  # so that tokens differ
    return model.to(device).eval().requires_grad_(False)


def packed(model: nn.Module, format: str) -> nn.Module:
    pattern, names = sc.NM(2, 4), [name for name in linears_of(model) if name != "lm_head"]
    with torch.no_grad():
        for name in names if format.startswith("semi24") else ():
            weight = model.get_parameter(f"{name}.weight")
            weight.mul_(pattern.mask(weight.abs().float()))
    sc.pack_(model, format, names)
    return model


def ids_of(rows: int, length: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, SIZES["vocab_size"], (rows, length), generator=generator).to(device)


def followed(model: nn.Module, ids: Tensor, mask: Tensor | None, count: int) -> KernelSteps:
    """Steps whose logits, at each of the model's own tokens, are the model's but for roundings."""
    steps = KernelSteps(model)
    logits = steps.start(ids, mask, ids.shape[1] + count + 1)
    assert steps.about == OWN, steps.about
    text, given = ids, mask
    for _ in range(count):
        tokens = logits.argmax(-1)
        text = torch.cat([text, tokens[:, None]], 1)
        logits = steps.step(tokens).float()
        positions = None
        if given is not None:
            given = torch.cat([given, given.new_ones(len(ids), 1)], 1)
            positions = (given.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            wanted = model(text, attention_mask=given, position_ids=positions).logits[:, -1]
        error = (logits - wanted.float()).norm() / wanted.float().norm()
        assert float(error) < 0.03, float(error)
    if mask is None:
        assert_prompts_are_read_alike(model, ids)
    return steps


def assert_prompts_are_read_alike(model: nn.Module, ids: Tensor) -> None:
    """Kernels read the prompt, and a part of it: logits and the next ones are the model's own."""
    prompts = kernel_steps._plans[model].prompts
    assert isinstance(prompts, Prompts)
    for length in (ids.shape[1], ids.shape[1] // 2, 1):
        text, steps = ids[:, :length], KernelSteps(model)
        logits = [steps.start(text, None, length + 2)]
        assert steps._forward.cache is None and steps.about == OWN
        logits.append(steps.step(logits[0].argmax(-1)))
        for found in logits:
            with torch.no_grad():
                wanted = model(text).logits[:, -1].float()
            error = (found.float() - wanted).norm() / wanted.norm()
            assert float(error) < 0.03, (length, float(error))
            text = torch.cat([text, logits[0].argmax(-1)[:, None]], 1)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Granite"])
def test_decoders_are_read(family: str) -> None:
    model = model_of(family, "cpu")
    decoder = read_decoder(model)
    assert len(decoder.blocks) == 4 and decoder.width == 512 and decoder.vocabulary == 1000
    block = decoder.blocks[2]
    inside = model.model.layers[2]
    assert block.out is inside.self_attn.o_proj and block.down is inside.mlp.down_proj
    assert (len(block.qkv), len(block.gate_up)) == ((1, 1) if family == "Phi3" else (3, 2))
    assert (block.head_norms is not None) == (family == "Qwen3")
    cosines, sines = decoder.rotation(9)
    assert cosines.shape == sines.shape == (9, 32) and float(cosines[0].min()) == 1.0


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (
            "Gemma2",
            "8 of its parameters are unknown here, model.layers.0.pre_f",
        ),
        ("GPT2", "GPT2LMHeadModel has no model"),
        ("OPT", "OPTModel has no rotary_emb"),
    ],
)
def test_others_are_named(family: str, reason: str) -> None:
    with pytest.raises(NotRead, match=reason):
        read_decoder(model_of(family, "cpu"))


def test_on_a_cpu_the_forward_runs() -> None:
    model, ids = model_of("Llama", "cpu"), ids_of(1, 5, "cpu")
    steps = KernelSteps(model)
    tokens = steps.start(ids, None, 20).argmax(-1)
    assert steps.about.startswith(f"{FORWARD}: running it packed needs a CUDA GPU"), steps.about
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(torch.cat([tokens[:, None], steps.greedy(tokens, 3)], 1), wanted[:, 5:])


def test_a_model_on_a_gpu_that_its_forward_runs_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = model_of("Llama", "cpu"), ids_of(1, 5, "cpu")
    plain = sc.generate(model, ids, max_new_tokens=3, stop_ids=())  # on a CPU it is no news
    monkeypatch.setattr(kernel_steps, "device_of", lambda model: torch.device("cuda"))
    with pytest.warns(
        UserWarning, match="own forward, not the GPU kernels: running it packed needs"
    ):
        assert torch.equal(sc.generate(model, ids, max_new_tokens=3, stop_ids=()), plain)
    sc.generate(model, ids, max_new_tokens=3, stop_ids=())
    other = model_of("Llama", "cpu")
    with pytest.warns(UserWarning, match="own forward"):
        other.generate(
            *(ids,),
            custom_generate=custom_generate,
            **{"max_new_tokens": 3, "do_sample": False, "eos_token_id": None},
        )


class ModelPlan(Plan):
    """A plan whose steps are those of the model, on any device; with `wrong` its logits are not."""

    def __init__(self, model: nn.Module, decoder: Decoder, memory: Memory, wrong: bool) -> None:
        super().__init__(decoder, memory)
        self.model, self.wrong = model, wrong
        text = ids_of(len(memory.tokens), 9, "cpu")
        self.text = torch.nn.functional.pad(text, (0, memory.slots - text.shape[1]))

    def run(self) -> None:
        memory, at = self.memory, int(self.memory.position)
        self.text[:, at] = memory.tokens
        with torch.no_grad():
            logits = self.model(self.text[:, : at + 1]).logits[:, -1]
        memory.logits.copy_(-logits if self.wrong else logits)
        memory.tokens.copy_(logits.argmax(-1))
        memory.history[at] = memory.tokens
        memory.position.add_(1)


@dataclass
class ModelPrompts:
    """Reads prompts by the model, on any device; with `wrong` its logits are not the model's."""

    plans: "Plans"

    def takes(self, length: int) -> bool:
        return length < self.plans.window

    def read(self, ids: Tensor, memory: Memory) -> Tensor:
        self.plans.read.append(tuple(ids.shape))
        with torch.no_grad():
            output = self.plans.model(ids, use_cache=True)
        for layer, keys, values in zip(
            output.past_key_values.layers, memory.keys, memory.values, strict=True
        ):
            keys[:, :, : ids.shape[1]], values[:, :, : ids.shape[1]] = layer.keys, layer.values
        memory.position.fill_(ids.shape[1])
        memory.padding.zero_()
        logits: Tensor = output.logits[:, -1]
        return -logits if self.plans.wrong_prompts else logits


@dataclass
class Plans:
    """Plans that run on this CPU, for texts of 9 ids, and what was made of them."""

    model: nn.Module
    made: list[ModelPlan] = field(default_factory=list)
    read: list[tuple[int, ...]] = field(default_factory=list)
    window: int = 1000
    wrong_prompts: bool = False
    wrong: bool = False
    failure: RuntimeError | None = None
    asked: int = 0

    def of(self, decoder: Decoder, memory: Memory) -> ModelPlan:
        self.asked += 1
        if self.failure is not None:
            raise self.failure
        self.made.append(ModelPlan(self.model, decoder, memory, self.wrong))
        return self.made[-1]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Plans:
    found = Plans(model_of("Llama", "cpu"))
    monkeypatch.setattr(kernel_steps, "why_no_plan", lambda decoder: None)
    monkeypatch.setattr(Plan, "of", staticmethod(found.of))
    monkeypatch.setattr(Prompts, "of", staticmethod(lambda decoder: ModelPrompts(found)))
    return found


def forwards(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the prompts that the model's own forward reads from now on."""
    seen, start = list[tuple[int, ...]](), ModelSteps.start

    def told(steps: ModelSteps, ids: Tensor, mask: Tensor | None, length: int) -> Tensor:
        seen.append(tuple(ids.shape))
        return start(steps, ids, mask, length)

    monkeypatch.setattr(ModelSteps, "start", told)
    return seen


def test_a_second_prompt_is_read_by_kernels_alone(
    plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, seen = plans.model, ids_of(2, 9, "cpu"), forwards(plans.model, monkeypatch)
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)[:, 9:]
    for prompts in (1, 2, 3):
        steps = KernelSteps(model)
        first = steps.start(ids, torch.ones_like(ids), 17).argmax(-1)
        assert steps.about == OWN and plans.read == [(2, 9)] * prompts and seen == [(2, 9)]
        assert torch.equal(torch.cat([first[:, None], steps.greedy(first, 3)], 1), wanted)
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    KernelSteps(model).start(ids, mask, 17)  # with padding
    assert seen == [(2, 9)] * 2 and len(plans.read) == 3


def test_prompts_that_kernels_read_otherwise_are_the_forwards(
    plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans.wrong_prompts = True
    model, ids, seen = plans.model, ids_of(2, 9, "cpu"), forwards(plans.model, monkeypatch)
    for prompts in (1, 2):
        steps = KernelSteps(model)
        logits = steps.start(ids, None, 17)
        with torch.no_grad():
            assert torch.equal(logits, model(ids).logits[:, -1])
        assert steps.about == OWN and len(plans.read) == 1 and len(seen) == prompts


def test_what_a_prompt_cannot_tell_a_later_one_does(
    plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans.window = 9  # as long as the first prompt
    model, seen = plans.model, forwards(plans.model, monkeypatch)
    KernelSteps(model).start(ids_of(2, 9, "cpu"), None, 17)
    assert not plans.read
    for length in (5, 6, 9):
        KernelSteps(model).start(ids_of(2, length, "cpu"), None, 17)
    assert plans.read == [(2, 5), (2, 6)] and seen == [(2, 9), (2, 5), (2, 9)]


def test_logits_that_are_no_numbers_are_told_by_the_forward(plans: Plans) -> None:
    model, ids = plans.model, ids_of(2, 9, "cpu")
    KernelSteps(model).start(ids, None, 17)
    model.lm_head.register_forward_hook(lambda *given: given[-1] * float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        KernelSteps(model).start(ids, None, 17)


def test_a_plan_makes_the_models_tokens_and_is_kept(plans: Plans) -> None:
    model, ids = plans.model, ids_of(2, 9, "cpu")
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 9:]
    for _ in range(2):
        steps = KernelSteps(model)
        first = steps.start(ids, None, 17).argmax(-1)
        assert steps.about == OWN
        second = steps.step(first).argmax(-1)
        rest = steps.greedy(second, 6)
        assert torch.equal(torch.cat([first[:, None], second[:, None], rest], 1), wanted)
    assert len(plans.made) == 1
    KernelSteps(model).start(ids_of(1, 9, "cpu"), None, 17)  # another batch
    KernelSteps(model).start(ids_of(1, 9, "cpu"), None, 300)  # a longer text
    assert [plan.memory.slots for plan in plans.made] == [256, 256, 512]
    with torch.no_grad():
        model.model.norm.weight.mul_(1.0)  # changed in place
    KernelSteps(model).start(ids_of(1, 9, "cpu"), None, 17)
    assert len(plans.made) == 4


def test_a_plan_does_not_keep_its_model(plans: Plans) -> None:
    model = plans.model
    KernelSteps(model).start(ids_of(1, 9, "cpu"), None, 17)
    kept, gone = kernel_steps._plans[model], weakref.ref(model)
    plans.made[0].model = plans.model = nn.Identity()
    del model
    gc.collect()
    assert gone() is None and kept.plan is plans.made[0]


def test_a_text_whose_cache_another_one_took_is_refused(plans: Plans) -> None:
    model, ids = plans.model, ids_of(2, 9, "cpu")
    steps, other = KernelSteps(model), KernelSteps(model)
    tokens = steps.start(ids, None, 30).argmax(-1)
    steps.step(tokens)
    other.start(ids, None, 30)
    for call in (lambda: steps.step(tokens), lambda: steps.greedy(tokens, 2)):
        with pytest.raises(RuntimeError, match="another one was begun with the same model"):
            call()
    other.step(tokens)


def test_a_plan_with_other_logits_is_not_used_again(plans: Plans) -> None:
    plans.wrong = True
    model, ids = plans.model, ids_of(2, 9, "cpu")
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, 9:]
    for _ in range(2):
        steps = KernelSteps(model)
        first = steps.start(ids, None, 20).argmax(-1)
        assert "differ by 2.0e+00" in steps.about and steps.about.startswith(FORWARD)
        assert torch.equal(torch.cat([first[:, None], steps.greedy(first, 4)], 1), wanted)
    assert len(plans.made) == 1


@pytest.mark.parametrize(
    ("failure", "asked"),
    [(RuntimeError("no such shared memory\nmore"), 1), (torch.OutOfMemoryError("no room"), 2)],
)
def test_what_a_gpu_does_not_take_is_asked_once_and_room_again(
    plans: Plans, failure: RuntimeError, asked: int
) -> None:
    plans.failure = failure
    model, ids = plans.model, ids_of(2, 9, "cpu")
    wanted = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)[:, 9:]
    for _ in range(2):
        steps = KernelSteps(model)
        first = steps.start(ids, None, 20).argmax(-1)
        assert steps.about == f"{FORWARD}: {str(failure).splitlines()[0]}"
        assert torch.equal(torch.cat([first[:, None], steps.greedy(first, 3)], 1), wanted)
    assert plans.asked == asked


def families(test: Callable[..., None]) -> Callable[..., None]:
    named = ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3"]
    for mark in (*gpu, pytest.mark.parametrize("family", named)):
        test = mark(test)
    return test


@families
def test_families_give_their_own_tokens(family: str) -> None:
    model = packed(model_of(family, "cuda"), "semi24_int4")
    followed(model, ids_of(1, 70, "cuda"), None, 6)


@families
def test_batches_with_padding(family: str) -> None:
    model = packed(model_of(family, "cuda"), "semi24")
    ids = ids_of(3, 40, "cuda")
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :39] = 0
    followed(model, ids.masked_fill(mask == 0, 0), mask, 4)


@pytest.mark.parametrize("format", ["", "semi24_int8", "semi24_fp8", "int4", "int8"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_other_formats_and_dense(format: str) -> None:
    model = model_of("Llama", "cuda")
    followed(packed(model, format) if format else model, ids_of(2, 33, "cuda"), None, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_greedy_tokens_are_those_of_steps_and_a_plan_serves_again() -> None:
    model, ids = packed(model_of("Llama", "cuda"), "semi24_int4"), ids_of(2, 50, "cuda")
    one, many = KernelSteps(model), KernelSteps(model)
    tokens = one.start(ids, None, 100).argmax(-1)
    made = [tokens]
    for _ in range(20):
        made.append(one.step(made[-1]).argmax(-1))
    assert torch.equal(tokens, many.start(ids, None, 100).argmax(-1))
    assert many._planned is one._planned and many._planned is not None
    assert torch.equal(torch.stack(made[1:], 1), many.greedy(tokens, 20))
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = packed(model_of("Llama", "cuda"), "semi24_int4").state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in other.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_changed_weight_is_seen() -> None:
    model, ids = model_of("Llama", "cuda"), ids_of(1, 20, "cuda")
    followed(model, ids, None, 2)
    model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    followed(model, ids, None, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("Gemma2", "unknown here"),
        ("Granite", "differ by"),
        ("GPT2", "has no model"),
    ],
)
def test_others_run_by_their_own_forward(family: str, reason: str) -> None:
    others = {"Granite": {"residual_multiplier": 0.3}, "GPT2": {}}.get(family, {})
    model = model_of(family, "cuda", **others)
    ids = ids_of(2, 12, "cuda")
    steps = KernelSteps(model)
    tokens = steps.start(ids, None, 40).argmax(-1)
    assert steps.about.startswith(FORWARD) and reason in steps.about, steps.about
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(torch.cat([tokens[:, None], steps.greedy(tokens, 5)], 1), wanted[:, 12:])
