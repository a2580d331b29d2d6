"""`model.generate(custom_generate=...)`: the ids of transformers' own loop."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.llm import custom_generate
from tests.llm.language import END, PAD, language_model, left_padded, prompts

NEW = 20


def both(model: Any, ids: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """What transformers' loop and ours return for the same call, from the same state."""
    settings = {"max_new_tokens": NEW, "do_sample": False} | settings
    torch.manual_seed(0)
    expected = model.generate(ids, **settings)
    torch.manual_seed(0)
    return expected, model.generate(ids, **settings, custom_generate=custom_generate)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "OPT"])
def test_ids_are_those_of_transformers_own_loop(family: str) -> None:
    model = language_model(family)
    ids, mask = left_padded([3, 7, 1, 5])
    for settings in (
        {"attention_mask": mask},
        {"attention_mask": mask, "eos_token_id": [5, 9, 11], "pad_token_id": PAD},
        {"attention_mask": mask, "do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9},
    ):
        expected, made = both(model, ids, **settings)
        assert torch.equal(made, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1, "min_new_tokens": 8},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "top_k": 0},
        {"eos_token_id": list(range(3, 20)), "pad_token_id": None},
        {"eos_token_id": list(range(3, 12)), "repetition_penalty": 1.1},
        {"cache_implementation": "static", "max_new_tokens": 1},
        {"max_length": 9, "max_new_tokens": None},
    ],
)
def test_settings_work_as_they_do_there(settings: dict[str, Any]) -> None:
    expected, made = both(language_model(), prompts(4, 6, 3), **settings)
    assert torch.equal(made, expected)
    plain = language_model().generate(prompts(4, 6, 3), max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
    assert not torch.equal(made, plain), "the settings make a difference"


def test_criteria_of_the_caller_end_it() -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class After(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **ignored: Any) -> Tensor:
            return torch.full((len(ids),), ids.shape[1] >= 9)

    criteria = StoppingCriteriaList([After()])
    expected, made = both(language_model(), prompts(2, 6), stopping_criteria=criteria)
    assert torch.equal(made, expected) and made.shape == (2, 9)


def test_criteria_of_the_caller_fill_nothing_up() -> None:
    """Rows that they end go on until all have ended, without a token that ends a text."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class RowByRow(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Any, **ignored: Any) -> Tensor:
            return torch.tensor([8, 10]) <= ids.shape[1]

    expected, made = both(language_model(), prompts(2, 6), eos_token_id=None,
                          stopping_criteria=StoppingCriteriaList([RowByRow()]))  # fmt: skip
    assert torch.equal(made, expected) and made.shape == (2, 10) and PAD not in made


def test_a_streamer_gets_each_token() -> None:
    """transformers keeps it from a loop of another's, so it is called as a loop is."""
    from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteriaList

    class Heard:
        def __init__(self) -> None:
            self.tokens, self.ended = list[Tensor](), False

        def put(self, tokens: Tensor) -> None:
            self.tokens.append(tokens)

        def end(self) -> None:
            self.ended = True

    heard, ids = Heard(), prompts(1, 4)
    made = custom_generate(
        language_model(), ids, [], StoppingCriteriaList([MaxLengthCriteria(9)]),
        GenerationConfig(max_length=9), streamer=heard,
    )  # fmt: skip
    assert heard.ended and torch.equal(torch.cat([ids[0], *heard.tokens]), made[0])
    assert made.shape == (1, 9)


def test_more_than_ids_is_refused() -> None:
    from transformers import DynamicCache

    model: Any = language_model()
    ids = prompts(2, 4)
    begun = model(ids, use_cache=True)
    name = "cache" if "cache" in begun else "past_key_values"
    cache = getattr(begun, name)
    assert isinstance(cache, DynamicCache)
    for settings, said in [
        ({"return_dict_in_generate": True}, "returns ids alone, got return_dict_in_generate=True"),
        ({"num_beams": 2}, "has no beams, got num_beams=2"),
        ({"use_cache": False}, "with a cache, got use_cache=False"),
        ({name: cache}, f"makes a cache of its own, got {name}: leave it out"),
        ({"position_ids": torch.arange(4)[None] + 1}, "positions by the mask, got other position"),
        ({"inputs_embeds": torch.zeros(2, 4, 16)}, "takes token ids and their mask, got inputs_"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1]] * 2)}, "mask needs 0 at padding on the l"),
    ]:
        with pytest.raises(ValueError, match=said):
            model.generate(ids, max_new_tokens=2, do_sample=False, custom_generate=custom_generate,
                           **settings)  # fmt: skip
    filled, own = DynamicCache(), DynamicCache()
    filled.update(torch.ones(2, 1, 4, 8), torch.ones(2, 1, 4, 8), 0)
    own._is_user_defined = True  # as newer releases say of an empty one, too
    for given in (filled, own):
        with pytest.raises(ValueError, match="makes a cache of its own, got past_key_values"):
            custom_generate(model, ids, [], [], model.generation_config, past_key_values=given)
    with pytest.raises(ValueError, match="one process with a cache, got synced_gpus=True"):
        custom_generate(model, ids, [], [], model.generation_config, synced_gpus=True)


def test_models_in_training_are_left_so() -> None:
    """transformers' own loop would apply dropout."""
    model: Any = copy.deepcopy(language_model("GPT2"))
    expected = model.generate(prompts(1, 4), max_new_tokens=NEW, do_sample=False)
    model.train()
    made = model.generate(
        prompts(1, 4), max_new_tokens=NEW, do_sample=False, custom_generate=custom_generate
    )
    assert torch.equal(made, expected) and model.training and END not in made
