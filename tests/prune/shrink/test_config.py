"""The entries of a config that say sizes, found by trial."""

from typing import Any

import pytest
import torch

from secateur.core.undo import Undo
from secateur.prune.shrink import shrink_
from secateur.prune.shrink.blocks import chain_of
from secateur.prune.shrink.config import Fit, Sizes, as_made_anew_, fitting, shapes_of
from secateur.prune.shrink.verb import Work
from tests.prune.shrink.models import language_model, logits, rows


def shapes_with(family: str, **entries: Any) -> dict[str, torch.Size]:
    return shapes_of(language_model(family, **entries))


def test_an_entry_is_found_by_its_value_and_by_the_shapes_that_it_makes() -> None:
    """24 is the hidden size here, too, and no other entry that is 24 makes these shapes."""
    same = {"hidden_size": 24, "vocab_size": 24, "max_position_embeddings": 24}
    model = language_model("Llama", **same)
    wanted = shapes_with("Llama", **same | {"intermediate_size": 18})
    found = list(fitting(model, Sizes([(24, 18)]), wanted))
    assert found[0] == Fit({((), "intermediate_size"): 18}, None)
    assert all(((), "intermediate_size") in fit.changed for fit in found)
    assert all(((), "hidden_size") not in fit.changed for fit in found)


def test_an_entry_that_is_unset_is_set() -> None:
    model = language_model("GPT2")
    wanted = shapes_with("GPT2", n_inner=48)
    assert list(fitting(model, Sizes([(64, 48)]), wanted)) == [Fit({((), "n_inner"): 48}, None)]


def test_entries_of_a_config_inside_another_are_found() -> None:
    transformers = pytest.importorskip("transformers")
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 20, "projection_dim": 8}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1, "patch_size": 4,
              "num_attention_heads": 2, "image_size": 8, "projection_dim": 8}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config).eval()
    batch = {"input_ids": torch.randint(3, 20, (2, 5)), "pixel_values": torch.randn(2, 3, 8, 8)}
    report = shrink_(model, [batch], width=0.5)
    assert report.config == {
        "text_config.intermediate_size": 12, "vision_config.intermediate_size": 20
    }  # fmt: skip
    assert model.text_model.config is model.config.text_config
    assert model.config.text_config.intermediate_size == 12


def test_blocks_take_their_element_of_each_list_with_them() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = language_model("Gemma2", layer_types=types)
    wanted = shapes_with("Gemma2", num_hidden_layers=2, layer_types=types[:2])
    first = next(fitting(model, Sizes([(3, 2)], gone=[1], blocks=3), wanted))
    assert first.changed == {
        ((), "layer_types"): ["sliding_attention"] * 2, ((), "num_hidden_layers"): 2
    }  # fmt: skip


def test_a_model_that_its_class_does_not_make_is_found_out() -> None:
    """A factor that no tensor shows: made anew, the model computes something else."""
    model = language_model("Llama")
    model.model.layers[0].self_attn.scaling *= 2
    before = logits(model)
    with pytest.raises(ValueError, match="made anew from its smaller LlamaConfig it computes some"):
        as_made_anew_(model, rows(1)[0], "width")
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="it computes something else: leave width at 0"):
        shrink_(model, rows(), width=0.5)
    assert model.config.intermediate_size == 24


def test_a_head_that_is_as_wide_as_there_are_heads_stays_as_wide() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 24,
             "num_layers": 1, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    report = shrink_(model, rows(), heads=0.5, refit=False)
    assert report.config == {"num_heads": 2}
    assert model.encoder.block[0].layer[0].SelfAttention.n_heads == 2


def test_the_next_choice_is_taken_where_one_computes_something_else() -> None:
    model = language_model("Llama")
    work = Work(model, rows(1), Undo())
    wrong, right = ({((), "rms_norm_eps"): value} for value in (0.5, 1e-6))
    work.settle_(iter([wrong, right]), "width")
    assert model.config.rms_norm_eps == work.config["rms_norm_eps"] == 1e-6
    with pytest.raises(ValueError, match="it computes something else"):
        work.settle_(iter([wrong]), "width")
    assert model.config.rms_norm_eps == 1e-6


def test_a_config_that_could_not_be_read_again_is_refused() -> None:
    """A backbone's config names the stages that it returns, of which the last would be gone."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "patch_size": 4,
             "num_attention_heads": 2, "image_size": 8}  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BeitModel(transformers.BeitConfig(**sizes)).eval()
    with pytest.raises(
        ValueError, match="BeitConfig refuses what would be left: out_features must"
    ):
        shrink_(model, [torch.randn(2, 3, 8, 8)], blocks=0.5)
    _, chain = chain_of(model)
    assert len(chain) == model.config.num_hidden_layers == 2
