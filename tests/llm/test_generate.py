"""`sc.generate`: transformers' tokens, seeded draws, stops, and what it refuses."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur.llm.generate import blocks
from secateur.llm.kernel_steps import steps_of
from secateur.llm.request import Request, Sampling, request
from secateur.llm.sampling import kept, most_likely, sampled
from secateur.llm.steps import ModelSteps, Steps
from tests.llm.language import (
    BOS,
    END,
    FAMILIES,
    PAD,
    POSITIONS,
    VOCABULARY,
    language_model,
    left_padded,
    prompts,
)

NEW = 20


def stock(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
    """What transformers' own loop makes."""
    writer: Any = model
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": NEW, "do_sample": False} | settings
    made: Tensor = writer.generate(ids, attention_mask=mask, **settings)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    model = language_model(family)
    for ids in (prompts(1, 5), prompts(1, 1, 3), prompts(3, 7, 1)):
        assert torch.equal(sc.generate(model, ids, max_new_tokens=NEW), stock(model, ids))
    ids, mask = left_padded([3, 7, 1, 5])
    made = sc.generate(model, ids, mask=mask, max_new_tokens=NEW)
    assert torch.equal(made, stock(model, ids, mask))
    assert torch.equal(made[:, :7], ids) and made.shape[1] == 7 + NEW
    # A mask means something: without it padding is read as tokens, and others come.
    assert not torch.equal(made, sc.generate(model, ids, max_new_tokens=NEW))
    # What a row goes on with is what it goes on with alone.
    alone = sc.generate(model, ids[:1, 4:], max_new_tokens=NEW)
    assert torch.equal(made[:1, 4 : 4 + alone.shape[1]], alone)


@pytest.mark.parametrize("stops", [(), (7,), (3, 9, 11, 20), tuple(range(3, 24))])
def test_sequences_end_and_are_filled_as_by_transformers(stops: tuple[int, ...]) -> None:
    model = language_model()
    ids, mask = left_padded([3, 7, 1, 5, 2, 2, 6, 4], seed=1)
    made = sc.generate(model, ids, mask=mask, max_new_tokens=NEW, stop_ids=stops)
    assert torch.equal(made, stock(model, ids, mask, eos_token_id=list(stops) or None))
    if len(stops) > 4:
        assert made.shape[1] < 7 + NEW, "all ended, the last of them now"
        assert bool(torch.isin(made[:, -1], torch.tensor(stops)).any())
        assert bool((made[:, -1] == PAD).any())


def test_stops_and_padding_are_the_model_s_own() -> None:
    model: Any = copy.deepcopy(language_model())
    ids = prompts(6, 4, 2)
    plain = sc.generate(model, ids, max_new_tokens=NEW, stop_ids=())
    model.generation_config.eos_token_id = [int(plain[0, 6]), int(plain[1, 8])]
    made = sc.generate(model, ids, max_new_tokens=NEW)
    assert torch.equal(made, stock(model, ids)) and not torch.equal(made, plain)
    assert int(made[0, 7]) == PAD
    model.generation_config.pad_token_id = None
    made = sc.generate(model, ids, max_new_tokens=NEW)
    assert int(made[0, 7]) == int(plain[0, 6]), "filled up with the first stop"


class InBlocks:
    """Steps that make several greedy tokens at once, by a model's; what was asked is kept."""

    about = "test"

    def __init__(self, model: nn.Module, block: int) -> None:
        self._steps, self.block = ModelSteps(model), block
        self.asked = list[int]()

    def start(self, ids: Tensor, mask: Tensor | None, length: int) -> Tensor:
        return self._steps.start(ids, mask, length)

    def step(self, tokens: Tensor) -> Tensor:
        return self._steps.step(tokens)

    def greedy(self, tokens: Tensor, count: int) -> Tensor:
        self.asked.append(count)
        return self._steps.greedy(tokens, count)


@given(
    block=st.integers(1, 9),
    count=st.integers(1, 12),
    stops=st.sets(st.integers(3, VOCABULARY - 1), max_size=12),
    seed=st.integers(0, 5),
)
def test_blocks_of_any_length_make_the_same_tokens(
    block: int, count: int, stops: set[int], seed: int
) -> None:
    """Blocks end with the count, and what is behind a stop is not shown."""
    model = language_model()
    ids, mask = left_padded([3, 5, 1], seed)
    asked = request(model, ids, count, mask=mask, stop_ids=sorted(stops))
    steps = InBlocks(model, block)
    made = list(blocks(steps, asked))
    whole = torch.cat([ids, *made], 1)
    assert torch.equal(whole, stock(model, ids, mask, max_new_tokens=count,
                                    eos_token_id=sorted(stops) or None))  # fmt: skip
    assert made[0].shape == (3, 1) and all(part.shape[1] <= block for part in made[1:])
    assert sum(steps.asked) <= count - 1 and all(n <= block for n in steps.asked)


def test_new_tokens_are_told_as_they_come_and_true_ends_it() -> None:
    model, ids = language_model(), prompts(2, 4)
    parts = list[Tensor]()
    made = sc.generate(model, ids, max_new_tokens=6, stop_ids=(), told=parts.append)
    assert [tuple(part.shape) for part in parts] == [(2, 1)] * 6
    assert torch.equal(torch.cat([ids, *parts], 1), made)
    few = sc.generate(model, ids, max_new_tokens=6, stop_ids=(), told=lambda new: True)
    assert torch.equal(few, made[:, :5])


def test_draws_are_repeatable_and_follow_the_distribution() -> None:
    model, ids = language_model(), prompts(2, 4)

    def drawn(seed: int | None) -> Tensor:
        return sc.generate(model, ids, max_new_tokens=NEW, temperature=1.0, top_k=20, seed=seed)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    state = torch.get_rng_state()
    drawn(1)
    assert torch.equal(torch.get_rng_state(), state), "a seed leaves torch's own generator alone"
    torch.manual_seed(5)
    one = drawn(None)
    torch.manual_seed(5)
    assert torch.equal(one, drawn(None)) and not torch.equal(one, drawn(None))
    # 2,000 rows of one prompt: frequencies of the first token, within 5 standard deviations
    many = ids[:1].expand(2000, -1)
    first = sc.generate(model, many, max_new_tokens=1, temperature=0.7, seed=0)[:, -1]
    with torch.no_grad():
        p = (model(ids[:1]).logits[0, -1] / 0.7).softmax(-1)
    found = torch.bincount(first, minlength=VOCABULARY) / 2000
    assert bool(((found - p).abs() <= 5 * (p * (1 - p) / 2000).sqrt() + 1e-9).all())
    # the only token that is kept is the most likely one
    greedy = sc.generate(model, ids, max_new_tokens=NEW)
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        least = sc.generate(model, ids, max_new_tokens=NEW, temperature=1.0, **options)  # type: ignore[arg-type]
        assert torch.equal(least, greedy)


@given(
    seed=st.integers(0, 2**31),
    tied=st.booleans(),
    top_k=st.none() | st.integers(1, 30),
    top_p=st.none() | st.floats(1e-12, 1.0),
)
def test_what_is_kept_is_what_transformers_keeps(
    seed: int, tied: bool, top_k: int | None, top_p: float | None
) -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = 3 * torch.randn(4, 20, generator=torch.Generator().manual_seed(seed))
    scores = scores.round() if tied else scores
    expected = scores
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(torch.empty(0), expected)
    if top_p is not None and top_p < 1:
        expected = TopPLogitsWarper(top_p)(torch.empty(0), expected)
    assert torch.equal(kept(scores, top_k, top_p), expected.isfinite())
    drawn = sampled(scores, 1.0, top_k, top_p, torch.Generator().manual_seed(seed))
    assert bool(expected.gather(1, drawn[:, None]).isfinite().all())
    assert torch.equal(most_likely(scores), scores.argmax(-1))


def test_two_of_four_equal_tokens_add_up_to_a_half() -> None:
    equal = torch.zeros(1, 4)
    assert int(kept(equal, None, 0.5).sum()) == 2
    assert int(kept(equal, None, 1e-9).sum()) == 1
    assert int(kept(equal, 1, None).sum()) == 4, "all are as large as the largest"


def test_the_model_is_left_as_it_was() -> None:
    """Even in training, where dropout would change the tokens, and it trains on afterwards."""
    model: Any = copy.deepcopy(language_model("GPT2"))
    ids = prompts(2, 4)
    expected = sc.generate(model, ids, max_new_tokens=NEW)
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = sc.generate(model, ids, max_new_tokens=NEW)
    assert torch.equal(made, expected) and not made.is_inference()
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        sc.generate(model, ids, max_new_tokens=2, told=lambda new: 1 // 0 == 0)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())
    model(made, labels=made).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_positions_that_grow_with_the_text_have_no_limit() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    settings = FAMILIES["Llama"] | {"max_position_embeddings": 8, "rope_parameters": rope}
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    ids = prompts(1, 6)
    made = sc.generate(model, ids, max_new_tokens=NEW, stop_ids=())
    assert torch.equal(made, stock(model, ids, eos_token_id=None))


def test_what_a_model_keeps_of_a_call_can_be_trained_with() -> None:
    """A table that is made when it is first needed is a tensor like any other."""
    model: Any = copy.deepcopy(language_model())
    tables = list[Tensor]()

    def scaled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        tables.extend([] if tables else [2 * torch.ones(output.shape[-1])])
        return output * tables[0]

    model.model.norm.register_forward_hook(scaled)
    made = sc.generate(model, prompts(1, 6), max_new_tokens=2)
    model(made, labels=made).loss.backward()
    assert model.model.norm.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_wrapped_models_generate() -> None:
    from peft import LoraConfig, get_peft_model

    model, ids = copy.deepcopy(language_model()), prompts(2, 4)
    expected = sc.generate(model, ids, max_new_tokens=NEW)
    parallel = nn.DataParallel(model)
    assert torch.equal(sc.generate(parallel, ids, max_new_tokens=NEW), expected)
    adapters = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))  # type: ignore[arg-type]
    assert torch.equal(sc.generate(adapters, ids, max_new_tokens=NEW), expected)
    ids, mask = left_padded([2, 4])
    assert torch.equal(
        sc.generate(adapters, ids, mask=mask.bool(), max_new_tokens=NEW), stock(model, ids, mask)
    )


def test_packed_models_generate_what_their_dense_form_does() -> None:
    model, ids = copy.deepcopy(language_model()), prompts(2, 4)
    sc.prune_(model, sc.plan(model, "2:4"))
    expected = sc.generate(model, ids, max_new_tokens=NEW)
    sc.pack_(model, "semi24")
    assert torch.equal(sc.generate(model, ids, max_new_tokens=NEW), expected)


def test_steps_say_what_they_are() -> None:
    steps = steps_of(language_model())
    assert isinstance(steps, ModelSteps) and steps.block == 1
    assert steps.about == "the model's own forward"
    with_cache: Steps = steps
    logits = with_cache.start(prompts(1, 3), None, 4)
    with_cache.step(logits.argmax(-1))
    with pytest.raises(AssertionError, match="token 4 in a cache of 4"):
        with_cache.step(logits.argmax(-1))


# --- what is refused -----------------------------------------------------------------------------

GOOD = prompts(2, 4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("ids", "options", "said"),
    [
        (GOOD[0], {}, r"got torch.int64 \[4\]: give a single prompt as ids\[None\]"),
        (GOOD.float(), {}, r"an integer tensor, got torch.float32 \[2, 4\]"),
        (GOOD > 3, {}, "got torch.bool"),
        ([[1, 2]], {}, "an integer tensor, got list: make a tensor"),
        (GOOD[:, :0], {}, r"a prompt of at least 1 token, got ids of shape \[2, 0\]"),
        (GOOD[:0], {}, r"a prompt of at least 1 token, got ids of shape \[0, 4\]"),
        (GOOD + VOCABULARY, {}, r"ids in \[0, 48\), got \d+ to \d+: use the model's own tok"),
        (-GOOD, {}, r"ids in \[0, 48\), got -\d+ to -\d+"),
        (GOOD, {"max_new_tokens": 0}, "max_new_tokens needs to be at least 1, got 0"),
        (GOOD, {"max_new_tokens": 2.5}, "max_new_tokens needs to be at least 1, got 2.5"),
        (GOOD, {"max_new_tokens": 61}, "64 positions, got a prompt of 4 tokens and "
         "max_new_tokens=61: pass max_new_tokens=60 at most, or shorten the prompt"),
        (prompts(1, POSITIONS), {}, "the model has 64 positions, the prompt alone has 64 tokens"),
        (GOOD, {"temperature": -0.5}, "temperature needs to be 0, or 1e-05 or more, got -0.5"),
        (GOOD, {"temperature": 1e-40}, "temperature needs to be 0, or 1e-05 or more, got 1e-40"),
        (GOOD, {"temperature": math.nan}, "temperature needs to be 0, or 1e-05 or more, got nan"),
        (GOOD, {"temperature": 1.0, "top_k": 0}, "top_k needs to be at least 1, got 0"),
        (GOOD, {"temperature": 1.0, "top_p": 0.0}, r"top_p needs to be in \(0, 1\], got 0.0"),
        (GOOD, {"temperature": 1.0, "top_p": 1.5}, r"top_p needs to be in \(0, 1\], got 1.5"),
        (GOOD, {"top_k": 5}, "are for draws, got 5 and None with.*: pass temperature=1.0 too"),
        (GOOD, {"top_p": 0.5}, "are for draws, got None and 0.5"),
        (GOOD, {"temperature": 1.0, "seed": -1}, r"seed needs to be in \[0, 2\*\*63\), got -1"),
        (GOOD, {"stop_ids": [5, 48]}, r"stop_ids need to be in \[0, 48\), got 48"),
        (GOOD, {"stop_ids": 5}, r"stop_ids needs ids in a list, got 5: pass \[5\]"),
        (GOOD, {"stop_ids": [-1]}, r"stop_ids need to be in \[0, 48\), got -1"),
        (GOOD, {"mask": torch.ones(2, 3)}, r"mask needs the shape of ids, \[2, 4\], got \[2, 3\]"),
        (GOOD, {"mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])},
         r"on the left and 1 at tokens up to the end, row 1 is \[1, 1, 1, 0\]: pad on the left"),
        (GOOD, {"mask": torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1]])}, r"row 0 is \[0, 1, 0, 1\]"),
        (GOOD, {"mask": torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])}, r"row 0 is \[0, 0, 0, 0\]"),
        (GOOD, {"mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 2]])}, r"row 1 is \[0, 0, 1, 2\]"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(ids: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sc.generate(language_model(), ids, **({"max_new_tokens": 2} | options))


def test_positions_count_tokens_and_not_padding() -> None:
    model = language_model()
    ids, mask = left_padded([3, 7])
    wide = torch.cat([torch.full((2, 10), PAD), ids], 1)
    masked = torch.cat([torch.zeros(2, 10, dtype=torch.long), mask], 1)
    made = sc.generate(model, wide, mask=masked, max_new_tokens=POSITIONS - 7)
    assert torch.equal(made, stock(model, wide, masked, max_new_tokens=POSITIONS - 7))
    with pytest.raises(ValueError, match="prompt of 7 tokens and max_new_tokens=58"):
        sc.generate(model, wide, mask=masked, max_new_tokens=POSITIONS - 6)


class NoLogits(nn.Module):
    """A model with a cache that gives something else."""

    def __init__(self, cache: object, logits: Tensor | None) -> None:
        super().__init__()
        self.found = SimpleNamespace(past_key_values=cache, logits=logits)

    def forward(self, input_ids: Tensor, use_cache: bool, past_key_values: Any = None) -> Any:
        return self.found


def test_models_that_cannot_go_on_are_refused() -> None:
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        MambaConfig,
        MambaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    tiny = {"vocab_size": 48, "num_hidden_layers": 1, "hidden_size": 16}
    bert = BertForMaskedLM(BertConfig(**tiny, num_attention_heads=2, intermediate_size=16))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    mamba = MambaForCausalLM(MambaConfig(**tiny, state_size=4))
    keeps = "generate needs a model that keeps keys and values of past tokens"
    decoder = "generate needs a decoder of token ids"
    nan = torch.full((2, 4, 8), torch.nan)
    for model, said in [
        (bert, f"{keeps}, BertForMaskedLM does not"),
        (mamba, f"{keeps}, MambaForCausalLM does not"),
        (t5, f"{decoder}, T5ForConditionalGeneration is none"),
        (nn.Linear(4, 4), f"{keeps}, Linear does not"),
        (NoLogits(None, torch.ones(2, 4, 8)), f"{keeps}, NoLogits does not"),
        (NoLogits("cache", None), "needs to be a float tensor or to have .logits, got"),
        (NoLogits("cache", nan), "logits need to be numbers, the prompt gave 64 NaN"),
    ]:
        with pytest.raises(ValueError, match=said):
            sc.generate(model, GOOD, max_new_tokens=2)


def test_padding_needs_a_model_that_takes_a_mask() -> None:
    ids, mask = left_padded([2, 4])
    model = NoLogits("cache", torch.ones(2, 4, 8))
    with pytest.raises(ValueError, match="NoLogits takes no attention_mask, got prompts with pad"):
        sc.generate(model, ids, mask=mask, max_new_tokens=1)
    assert sc.generate(model, ids, mask=mask | 1, max_new_tokens=1).shape == (2, 5)


def test_settings_of_the_model_that_are_not_applied_are_told() -> None:
    model: Any = copy.deepcopy(language_model())
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.top_k = 5  # which a greedy choice would not use either
    with pytest.warns(UserWarning, match=r"does not apply repetition_penalty=1.5 of the model's"):
        sc.generate(model, GOOD, max_new_tokens=2)


def test_a_request_is_on_the_device_and_filled_with_something() -> None:
    asked = request(language_model(), GOOD.int(), 3, stop_ids=())
    assert asked == Request(asked.ids, None, 3, Sampling(), (), PAD) and asked.length == 7
    assert asked.ids.dtype is torch.long
    assert request(language_model("GPT2"), GOOD, 3).pad == END
    assert END != BOS
