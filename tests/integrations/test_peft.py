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

from secateur.integrations.peft import merge_adapters_  # noqa: E402
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


# --- merged --------------------------------------------------------------------------------------

# What PEFT itself cannot merge, or what changes no weight.
UNMERGEABLE = {
    *("ADAPTION_PROMPT", "BEFT", "CARTRIDGE", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "POLY"),
    *("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA"),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's, of FRoD's tensors
@pytest.mark.parametrize("method", adapters.METHODS)
def test_merging_is_the_merge_of_peft_with_zeros_kept(method: str, tmp_path: Path) -> None:
    model = adapters.llama()
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan)
    before = values(model)
    adapted = adapters.with_adapter(model, method, tmp_path)
    around = values(adapted)
    if method in UNMERGEABLE:
        with pytest.raises(ValueError, match="beside the model"):
            merge_adapters_(adapted)
        after = values(adapted)
        assert all(torch.equal(after[name], around[name]) for name in around)
        return
    whole = copy.deepcopy(adapted).merge_and_unload().state_dict()
    report = merge_adapters_(adapted)
    assert adapted.get_base_model() is model
    assert values(model).keys() == before.keys()
    assert sc.check(model, plan) == dict.fromkeys(plan.layers, 0.5)
    changed = 0
    for name, tensor in values(model).items():
        kept = torch.ones_like(tensor, dtype=torch.bool) if tensor.dim() < 2 else before[name] != 0
        torch.testing.assert_close(tensor, torch.where(kept, whole[name], 0))
        changed += not torch.equal(tensor, before[name])
    assert changed, "the adapter does something"
    for merged in report.weights:
        name = f"{merged.weight}.weight"
        delta = (whole[name] - before[name]).double()
        lost = delta[before[name] == 0].norm()
        assert merged.added == pytest.approx(float(delta.norm()), rel=1e-4, abs=1e-6)
        assert merged.dropped == pytest.approx(float(lost), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_adapters_are_added_with_factors(dtype: torch.dtype) -> None:
    model = adapters.llama(dtype)
    sc.prune_(model, sc.plan(model, "2:4"))
    before = model.get_submodule(Q).weight.detach().double()
    adapted = lora(model, lora_alpha=6)
    adapted.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    layer = adapted.get_submodule(f"base_model.model.{Q}")
    torch.nn.init.normal_(layer.lora_B["other"].weight)

    def product(name: str) -> Tensor:
        B, A = layer.lora_B[name].weight.double(), layer.lora_A[name].weight.double()
        return layer.scaling[name] * (B @ A).detach()

    added = 0.5 * product("default") - 2.0 * product("other")
    report = merge_adapters_(adapted, {"default": 0.5, "other": -2.0})
    expected = torch.where(before != 0, before + added, 0)
    torch.testing.assert_close(model.get_submodule(Q).weight, expected.to(dtype))
    row = next(w for w in report.weights if w.weight == Q)
    assert row.zeros == 0.5
    assert row.added == pytest.approx(float(added.norm()), rel=1e-3)
    assert row.cost == pytest.approx(float(added[before == 0].norm() / added.norm()), rel=1e-3)
    total = sum(w.dropped**2 for w in report.weights) / sum(w.added**2 for w in report.weights)
    assert report.cost == pytest.approx(total**0.5)
    assert str(report).endswith(f"their masks dropped {report.cost:.1%} (Frobenius norm)")
    assert report.to_dict()["adapters"] == {"default": 0.5, "other": -2.0}


def test_conv1d_embeddings_biases_and_copies_keep_their_zeros() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan)
    before = values(model)
    options = {"target_modules": ["c_attn", "wte"], "modules_to_save": ["mlp"], "lora_bias": False}
    adapted = lora(model, fan_in_fan_out=True, **options)
    copied = adapted.get_submodule("base_model.model.transformer.h.0.mlp").modules_to_save.default
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter += 0.1
    whole = copy.deepcopy(adapted).merge_and_unload().state_dict()
    merge_adapters_(adapted)
    after = values(model)
    assert sc.check(model, plan) == dict.fromkeys(plan.layers, 0.5)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        kept = before[name] != 0 if tensor.dim() > 1 else torch.tensor(True)
        torch.testing.assert_close(tensor, torch.where(kept, whole[name], 0))
    for name in ("transformer.wte.weight", "transformer.h.0.mlp.c_fc.bias"):
        assert not torch.equal(after[name], before[name])


def refused(adapted: Any, words: str, **options: Any) -> None:
    """Merging raises, and nothing has changed: values, modules, what PEFT knows."""
    before, modules = values(adapted), dict(adapted.named_modules())
    data = {name: p.data_ptr() for name, p in adapted.named_parameters()}
    with pytest.raises(ValueError, match=words):
        merge_adapters_(adapted, **options)
    after = values(adapted)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n].nan_to_num(), before[n].nan_to_num()) for n in before)
    assert dict(adapted.named_modules()) == modules
    assert {name: p.data_ptr() for name, p in adapted.named_parameters()} == data


def test_a_merge_that_is_refused_has_changed_nothing(monkeypatch: Any) -> None:
    model = adapters.llama()
    sc.prune_(model, sc.plan(model, "2:4"))
    with pytest.raises(ValueError, match=r"needs a peft.PeftModel, got LlamaForCausalLM: put an"):
        merge_adapters_(model)
    adapted = lora(model)
    refused(adapted, "the model has no adapter 'x': name one of default", adapters="x")
    refused(adapted, "needs a finite factor, got nan", adapters={"default": float("nan")})
    refused(adapted, "needs an adapter, got none", adapters=[])
    last = f"{Q.replace('.0.', '.1.').replace('self_attn.q', 'mlp.down')}"
    broken = adapted.get_submodule(f"base_model.model.{last}").lora_B["default"].weight
    with torch.no_grad():
        kept = broken.clone()
        broken[0] = float("inf")
    refused(adapted, rf"PEFT cannot merge default into {last} \(NaNs detected.*beside the model")
    with torch.no_grad():
        broken.copy_(kept)

    def unload(self: Any) -> None:
        type(self).merge_and_unload(self)
        raise RuntimeError("late")

    monkeypatch.setattr(type(adapted.base_model), "unload", unload)
    before, config = values(adapted), model.peft_config
    with pytest.raises(RuntimeError, match="late"):
        merge_adapters_(adapted)
    after = values(adapted)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.peft_config is config
    monkeypatch.undo()
    adapted.merge_adapter()
    refused(adapted, r"q_proj has \['default'\] merged: call unmerge_adapter")
    adapted.unmerge_adapter()
    assert merge_adapters_(adapted).cost > 0.1


def test_a_packed_base_is_unpacked_before_merging() -> None:
    model = adapters.llama()
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan)
    sc.pack_(model, "semi24", list(plan.layers))
    adapted = lora(model)
    refused(adapted, rf"{Q}.weight is packed: unpack_\(model\) first")
    for safe in (False, True):
        with pytest.raises(ValueError, match="a packed weight is read-only.*merge_adapters_"):
            copy.deepcopy(adapted).merge_and_unload(safe_merge=safe)
    sc.unpack_(adapted)
    merge_adapters_(adapted)
    assert sc.check(model, plan) == dict.fromkeys(plan.layers, 0.5)
    sc.pack_(model, "semi24", list(plan.layers))


def test_adapters_that_do_not_add_up_and_tied_weights_are_refused(tmp_path: Path) -> None:
    adapted = adapters.with_adapter(adapters.llama(), "OFT", tmp_path)
    adapted.add_adapter("other", adapted.peft_config["default"])
    for name, parameter in adapted.named_parameters():
        if name.endswith("other.weight"):
            torch.nn.init.normal_(parameter)
    refused(adapted, "adapters default, other do not add up", adapters=["default", "other"])
    model = adapters.llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    refused(lora(model, target_modules=["embed_tokens"]), "is tied to lm_head, which would change")


# --- trained -------------------------------------------------------------------------------------


def trained(adapted: Any, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[float]:
    """The losses of a few steps towards a fixed text."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("base", ["packed", "held", "held and trained with it"])
def test_lora_trains_beside_zeros(base: str) -> None:
    model = adapters.llama()
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan)
    if base == "packed":
        sc.pack_(model, "semi24", list(plan.layers))
    adapted = adapters.around(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], bias="none")
    )
    if base == "held and trained with it":
        adapted.get_base_model().requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    held = [p for n, p in adapted.named_parameters() if p.requires_grad and "lora_" not in n]
    if base == "held and trained with it":
        sc.hold(adapted, optimizer)
    before = values(adapted)
    losses = trained(adapted, optimizer)
    assert losses[-1] < losses[0]
    after = values(adapted)
    assert all(not torch.equal(after[n], before[n]) for n in before if "lora_" in n)
    if not held:
        assert all(torch.equal(after[n], before[n]) for n in before if "lora_" not in n)
    if base == "packed":
        sc.unpack_(adapted)
    assert sc.check(adapted, plan) == dict.fromkeys(plan.layers, 0.5)
    merge_adapters_(adapted)
    assert sc.check(model, plan) == dict.fromkeys(plan.layers, 0.5)


def kept_positions(base_layer: Any, r: int, **_: Any) -> Tensor:
    """The mask of SHiRA's weights: the kept weights of a pruned layer."""
    return (base_layer.weight != 0).to(base_layer.weight.dtype)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's, of SHiRA's tensors
@pytest.mark.parametrize("method", ["HIRA", "SHIRA", "LORA"])
def test_which_merges_of_peft_keep_zeros(method: str) -> None:
    model = adapters.llama()
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan)
    targets = ["q_proj", "down_proj"]
    if method == "SHIRA":
        # r (in + out) weights are trained, as many as 2:4 keeps in a layer of 16 x 16.
        config = peft.ShiraConfig(r=4, target_modules=targets)
        config.mask_fn = kept_positions
    else:
        config = adapters.CONFIGS[method](r=2, target_modules=targets)
    before = values(model)
    adapted = adapters.around(model, config)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = trained(adapted, optimizer)
    assert losses[-1] < losses[0]
    merged = adapted.merge_and_unload()
    assert not torch.equal(merged.get_submodule(Q).weight, before[f"{Q}.weight"])
    if method == "LORA":
        with pytest.raises(ValueError, match=r"4 of 14 layers break the plan.*merge_adapters_"):
            sc.check(merged, plan)
    else:
        assert sc.check(merged, plan) == dict.fromkeys(plan.layers, 0.5)
