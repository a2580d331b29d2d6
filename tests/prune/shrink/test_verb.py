"""Heads, hidden units, experts and blocks go, and an ordinary smaller model is left."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.prune.shrink import shrink_
from secateur.prune.shrink import verb as the_verb
from tests.prune.channels.models import ResNet, images, lively
from tests.prune.shrink.models import language_model, logits, rows, states

# What becomes of one share of each family; heads of others are refused below.
SMALLER: list[tuple[str, dict[str, float], dict[str, Any]]] = [
    ("Llama", {"width": 0.25}, {"intermediate_size": 18}),
    ("Llama", {"heads": 0.5}, {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ("Llama", {"blocks": 0.3}, {"num_hidden_layers": 2}),
    ("Llama", {"width": 0.5, "heads": 0.75, "blocks": 0.3},
     {"num_hidden_layers": 2, "intermediate_size": 12, "num_attention_heads": 2,
      "num_key_value_heads": 1}),
    ("Qwen2", {"heads": 0.5},
     {"head_dim": 2, "num_attention_heads": 4, "num_key_value_heads": 2}),
    ("Qwen2", {"blocks": 0.3}, {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}),
    ("Qwen3", {"width": 0.5, "heads": 0.75},
     {"intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}),
    ("Gemma2", {"heads": 0.5}, {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ("Gemma3", {"width": 0.5}, {"intermediate_size": 12}),
    ("Phi3", {"width": 0.5, "heads": 0.5},
     {"head_dim": 2, "intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2}),
    ("OPT", {"width": 0.5}, {"ffn_dim": 12}),
    ("GPT2", {"width": 0.25, "blocks": 0.3}, {"n_layer": 2, "n_inner": 48}),
    ("Mixtral", {"experts": 0.25}, {"num_local_experts": 3}),
    ("Mixtral", {"experts": 0.5, "heads": 0.75},
     {"num_local_experts": 2, "num_attention_heads": 2, "num_key_value_heads": 1}),
    ("Qwen3Moe", {"experts": 0.5, "heads": 0.5, "blocks": 0.3},
     {"num_hidden_layers": 2, "num_local_experts": 2, "num_attention_heads": 4,
      "num_key_value_heads": 2}),
    ("Olmoe", {"experts": 0.5}, {"num_experts": 2}),
    ("GraniteMoe", {"experts": 0.5}, {"num_local_experts": 2}),
    ("GptOss", {"experts": 0.5, "heads": 0.5},
     {"num_local_experts": 2, "num_attention_heads": 4, "num_key_value_heads": 2}),
    ("DeepseekV3", {"experts": 0.5}, {"n_routed_experts": 4}),
    ("Mixtral", {"width": 0.5}, {"intermediate_size": 12}),
    ("GptOss", {"width": 0.5, "heads": 0.5},
     {"intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2}),
]  # fmt: skip


def written(model: Any) -> Tensor:
    return model.generate(rows(1)[0][:2], max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize(
    "family, shares, config", SMALLER, ids=lambda x: x if isinstance(x, str) else "-".join(x)
)
def test_what_is_left_is_what_transformers_loads(
    family: str, shares: dict[str, float], config: dict[str, Any], tmp_path: Path
) -> None:
    model = language_model(family)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    report = shrink_(model, rows(), **shares)
    assert report.config == config
    small = {name: id(p) for name, p in model.named_parameters()}
    assert "blocks" in shares or small == parameters
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.parameters < report.parameters_before
    assert report.flops < report.flops_before
    sc.save(model, tmp_path / "out", reports=[report])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns of its own
        stock, told = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert torch.equal(logits(stock), logits(model))
    assert torch.equal(written(stock), written(model))
    for name, module in stock.named_modules():
        numbers = {k: v for k, v in vars(module).items() if type(v) is int}
        own = vars(model.get_submodule(name))
        assert {k: own[k] for k in numbers} == numbers, name
    assert model.config.to_dict() == stock.config.to_dict() | {
        k: v for k, v in model.config.to_dict().items() if k in ("architectures", "_name_or_path")
    }


REFUSED = [
    ("GPT2", "heads", "GPT2Config has no entries that say the sizes that would be left: leave"),
    ("OPT", "heads", "OPTConfig has no entries that say the sizes that would be left: leave"),
    ("Llama", "heads", r"LlamaConfig refuses what would be left: The hidden size \(16\) is not a"),
    ("Olmoe", "heads", "self_attn.q_norm is a mean over it: leave heads at 0"),
    ("DeepseekV3", "width", "DeepseekV3Config has no entries that say the sizes that would be"),
    ("Llama", "experts", "LlamaForCausalLM has no experts that transformers keeps in stacks"),
]


@pytest.mark.parametrize("family, kind, message", REFUSED)
def test_what_a_config_cannot_say_is_refused(family: str, kind: str, message: str) -> None:
    model = language_model(family)
    config, before = model.config, states(model)
    with pytest.raises(ValueError, match=message):
        shrink_(model, rows(), **{kind: 0.25 if family == "Llama" and kind == "heads" else 0.5})
    assert_untouched(model, config, before)


def assert_untouched(model: Any, config: Any, before: dict[str, Tensor]) -> None:
    assert model.config is config and model.model.config is config if hasattr(model, "model") else 1
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "shares", [{"width": 0.5, "heads": 0.5}, {"experts": 0.5}, {"blocks": 0.3}], ids="-".join
)
def test_an_interrupt_at_the_end_leaves_the_model_as_it_was(
    shares: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = language_model("Mixtral" if "experts" in shares else "Llama")
    config, before, dense = model.config, states(model), logits(model)
    entries = copy.deepcopy(config.to_dict())

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(the_verb, "as_made_anew_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shrink_(model, rows(), **shares)
    assert_untouched(model, config, before)
    assert config.to_dict() == entries
    assert torch.equal(logits(model), dense)
    monkeypatch.undo()
    shrink_(model, rows(), **shares)


def test_the_config_that_others_were_made_from_stays() -> None:
    model = language_model("Llama")
    other = type(model)(model.config)
    shrink_(model, rows(1), blocks=0.5)
    assert other.config.num_hidden_layers == 3
    assert all(
        module.config is model.config for module in model.modules() if hasattr(module, "config")
    )


def hidden_scores(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """For each down_proj sum_i |W_ij| ||x_j||, from hooks of this test's own."""
    energy: dict[str, Tensor] = {}

    def add(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            energy[name] = energy.get(name, 0) + args[0].double().flatten(0, -2).square().sum(0)

        return hook

    layers = {n: m for n, m in model.named_modules() if n.endswith(("down_proj", "o_proj"))}
    handles = [m.register_forward_pre_hook(add(n)) for n, m in layers.items()]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {n: m.weight.data.double().abs().sum(0) * energy[n].sqrt() for n, m in layers.items()}


def test_hidden_units_of_the_lowest_scores_go_and_the_others_keep_their_weights() -> None:
    model = language_model("Llama")
    dense, scores = copy.deepcopy(model), hidden_scores(model, rows())
    report = shrink_(model, rows(), width=0.25, refit=False)
    names = [name for name in scores if name.endswith("down_proj")]
    for row, name in zip(report.removed, names, strict=True):
        kept = scores[name].argsort(descending=True)[:18].sort().values
        big, small = dense.get_submodule(name), model.get_submodule(name)
        assert torch.equal(small.weight, big.weight[:, kept])
        up = name.replace("down", "up")
        assert torch.equal(model.get_submodule(up).weight, dense.get_submodule(up).weight[kept])
        assert (row.layer, row.before, row.after) == (name, 24, 18)
        lost = 1 - float(scores[name][kept].sum() / scores[name].sum())
        assert row.lost == pytest.approx(lost, rel=1e-5)


def test_heads_go_with_all_queries_that_read_them() -> None:
    model = language_model("Llama")
    dense, scores = copy.deepcopy(model), hidden_scores(model, rows())
    shrink_(model, rows(), heads=0.5, refit=False)
    name = "model.layers.1.self_attn.o_proj"
    groups = scores[name].view(4, 8).sum(1).argsort(descending=True)[:2].sort().values.tolist()
    columns = [8 * group + i for group in groups for i in range(8)]
    assert torch.equal(
        model.get_submodule(name).weight, dense.get_submodule(name).weight[:, columns]
    )
    keys = [4 * group + i for group in groups for i in range(4)]
    k = "model.layers.1.self_attn.k_proj"
    assert torch.equal(model.get_submodule(k).weight, dense.get_submodule(k).weight[keys])


def test_a_refit_brings_the_layer_nearer_to_what_it_was() -> None:
    """On the last down_proj, whose inputs are the dense model's if nothing before it shrinks."""
    losses = {}
    for refit in (False, True):
        model = language_model("Llama", num_hidden_layers=1)
        dense = logits(model)
        shrink_(model, rows(), width=0.5, refit=refit)
        losses[refit] = float((logits(model) - dense).square().sum())
    assert losses[True] < 0.9 * losses[False]


def test_blocks_that_change_least_go() -> None:
    model = language_model("Llama")
    with torch.no_grad():  # the middle block hardly adds anything
        for name, parameter in model.model.layers[1].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1e-3)
    dense = copy.deepcopy(model)
    report = shrink_(model, rows(), blocks=0.3)
    dense.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    assert torch.equal(logits(model), logits(dense))
    (row,) = report.removed
    assert (row.kind, row.layer, row.before, row.after) == ("blocks", "model.layers", 3, 2)
    assert row.lost < 1e-3


def test_all_units_of_a_plain_model_compete_by_their_share_of_the_mean() -> None:
    """Scores that are all small cost a layer nothing; many that are smaller than its others do."""
    model = lively(ResNet(widths=(8, 12), hidden=(10, 10)))
    with torch.no_grad():
        model.a.conv2.weight.mul_(1e-3)  # of all channels alike
        model.b.conv2.weight[:, 2:].mul_(1e-3)  # of all but two
    report = shrink_(model, [images()], width=0.25, criterion=sc.magnitude, scope="model")
    after = {row.layer: row.after for row in report.removed}
    assert sum(row.before for row in report.removed) == 8 + 10 + 10 + 12
    assert sum(row.before - row.after for row in report.removed) == 10
    assert after["b.conv2"] == 2 and after["a.conv2"] >= 8
    assert model(images()).shape == (3, 5)
    assert (model.b.conv1.out_channels, model.b.bn1.num_features) == (2, 2)


BAD = [
    ({}, "shrink_ needs a share of width, heads, experts or blocks, as width=0.25"),
    ({"width": 25.0}, r"width is the share that goes, in \[0, 1\), got 25"),
    ({"width": 0.99}, "has 24 width, of which 0.99 would leave none: lower width"),
    ({"blocks": 0.9}, "model.layers has 3 blocks, of which 0.9 would leave none: lower blocks"),
    ({"width": 0.5, "scope": "model"}, "use scope='layer', for one size in all layers"),
]


@pytest.mark.parametrize("shares, message", BAD)
def test_what_cannot_be_done_is_said(shares: dict[str, Any], message: str) -> None:
    model = language_model("Llama")
    config, before = model.config, states(model)
    with pytest.raises(ValueError, match=message):
        shrink_(model, rows(), **shares)
    assert_untouched(model, config, before)


def test_fewer_experts_than_a_token_has_are_refused() -> None:
    with pytest.raises(ValueError, match="sends each token to 2 experts, 1 of 4 would be left"):
        shrink_(language_model("Mixtral"), rows(), experts=0.75)


def test_a_batch_is_needed() -> None:
    with pytest.raises(ValueError, match="needs at least one batch, got none"):
        shrink_(language_model("Llama"), [], width=0.5)


def test_the_report_says_what_went_and_what_it_saves() -> None:
    report = shrink_(language_model("Llama"), rows(), width=0.25)
    text = str(report)
    assert "parameters became" in text and "config: intermediate_size = 18" in text
    assert report.to_dict()["removed"][0]["kind"] == "width"
    # a token multiplies by 6 * 16 weights less in each of 3 MLPs' 3 matrices, 8 * 11 tokens
    assert report.flops_before - report.flops == 2 * 88 * 3 * 3 * 6 * 16
    assert report.parameters_before - report.parameters == 3 * 3 * 6 * 16
