"""Models with PEFT's adapters: left alone by the verbs, trained beside zeros, merged with them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur as sc
from secateur.core.coverage import ADAPTERS
from secateur.report.inspection import inspect

peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
pytest.importorskip("transformers", reason="the models are transformers'")

from tests.integrations import adapters  # noqa: E402

IDS = torch.arange(12).view(2, 6)
Q = "model.layers.0.self_attn.q_proj"
LAYERS = 14  # linear layers in the two blocks


def lora(model: Any, **options: Any) -> Any:
    """The model with a LoRA adapter whose two factors are random."""
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"]} | options)
    made = adapters.around(model, config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return made.eval()


def values(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- left alone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", adapters.METHODS)
def test_pruning_leaves_the_adapters_of_every_method_alone(method: str, tmp_path: Path) -> None:
    model = adapters.llama()
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    adapted = adapters.with_adapter(model, method, tmp_path)
    beside = {n: p for n, p in adapted.named_parameters() if id(p) not in own}
    assert beside, "the method has parameters of its own"
    before = values(adapted)

    plan = sc.plan(adapted, "2:4")
    pruned = {own[id(adapted.get_parameter(f"{name}.weight"))] for name in plan.layers}
    assert len(pruned) == len(plan.layers) == LAYERS, "all layers of the model and no others"
    assert plan.left[ADAPTERS] == sum(parameter.numel() for parameter in beside.values())
    assert inspect(adapted).left[ADAPTERS] == plan.left[ADAPTERS]

    sc.prune_(adapted, plan)
    assert set(sc.check(adapted, plan).values()) == {0.5}
    after = values(adapted)
    assert all(torch.equal(after[name], before[name]) for name in beside)


@pytest.mark.parametrize(
    "selector", ["*.q_proj", "re:q_proj$", "*q_proj.weight", "*.q_proj.base_layer"]
)
def test_layers_under_adapters_are_matched_by_their_own_names(selector: str) -> None:
    adapted = lora(adapters.llama())
    chosen = [f"base_model.model.model.layers.{i}.self_attn.q_proj.base_layer" for i in (0, 1)]
    assert list(sc.plan(adapted, "2:4", layers=selector).layers) == chosen
    assert len(sc.plan(adapted, "2:4", ignore=selector).layers) == LAYERS - 2
    assert list(sc.plan(adapted, "2:4", layers=Q).layers) == chosen[:1]
    assert list(sc.plan(adapted, {Q: "2:4", "*q_proj": "4:8"}).layers.values()) == [
        sc.NM(2, 4),
        sc.NM(4, 8),
    ]


def test_a_plan_without_adapters_holds_with_them() -> None:
    model = adapters.llama()
    plan = sc.plan(model, "2:4")
    adapted = lora(model)
    with pytest.raises(ValueError, match=r"14 of 14 layers break the plan: .*proj \(2:4\)"):
        sc.check(adapted, plan)
    report = sc.prune_(adapted, plan)
    assert [layer.layer for layer in report.layers] == list(plan.layers)
    assert sc.check(adapted, plan) == dict.fromkeys(plan.layers, 0.5)
    with pytest.raises(ValueError, match="14 of its 14 layers are missing"):
        sc.check(torch.nn.Sequential(adapted), plan)


def test_reconstruction_sees_the_adapters_and_leaves_them() -> None:
    adapted = lora(adapters.llama())
    before = values(adapted)
    alone = copy.deepcopy(adapted)
    plan = sc.plan(adapted, "2:4")
    sc.reconstruct_(adapted, plan, sc.sparsegpt, [IDS])
    after = values(adapted)
    kept = [name for name in before if "lora_" in name]
    assert len(kept) == 8
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert set(sc.check(adapted, plan).values()) == {0.5}
    # Layers behind an adapter see what it adds.
    with alone.disable_adapter():
        sc.reconstruct_(alone, plan, sc.sparsegpt, [IDS])
    first, *_, behind = list(plan.layers)[:4]
    assert torch.equal(after[f"{first}.weight"], values(alone)[f"{first}.weight"])
    assert not torch.equal(after[f"{behind}.weight"], values(alone)[f"{behind}.weight"])
