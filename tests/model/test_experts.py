"""Experts in 3-D parameters: each matrix a layer that sees its own expert's tokens."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.criteria.taylor import taylor
from secateur.model.calibrate import observe
from secateur.model.experts import called_by_expert, experts_of
from secateur.model.gradients import gradients
from secateur.model.layers import layers_of
from secateur.model.piece import is_expert
from secateur.reconstruct.lowrank import compensate
from secateur.report.inspection import inspect
from tests.reconstruct.problems import gpt2_and_batches

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8},
    "Mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "Olmoe": {"intermediate_size": 24, "num_experts": 4},
    "GraniteMoe": {"intermediate_size": 24, "num_local_experts": 4},
    # transposed and interleaved stacks, with biases
    "GptOss": {
        "intermediate_size": 24, "num_local_experts": 4, "head_dim": 8,
        "layer_types": ["full_attention"] * 2,
    },
}  # fmt: skip


FIRST = "model.layers.0.mlp.experts"


def mixture(family: str = "Qwen3Moe") -> nn.Module:
    """A tiny model of the family, with random weights."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    return model


def rows(count: int = 3) -> list[Tensor]:
    """Batches of 192 tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 48, (16, 12), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_goes_the_whole_way(family: str, tmp_path: Path) -> None:
    model, batches = mixture(family), rows()
    plan = sc.plan(model, "2:4")
    assert plan.weights + sum(plan.left.values()) == sum(p.numel() for p in model.parameters())
    assert len(plan.layers) == 2 * (4 + 2 * 4)
    report = sc.prune_(model, plan, sc.wanda, batches)
    for stack in ("gate_up_proj", "down_proj"):
        seen = [r.tokens for r in report.layers if f"layers.1.mlp.experts.{stack}" in r.layer]
        assert not seen or sum(seen) == 2 * sum(batch.numel() for batch in batches)
    assert sc.check(model, plan) == dict.fromkeys(plan.layers, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sc.hold(model, optimizer):
        model(batches[0], labels=batches[0]).loss.backward()
        optimizer.step()
    sc.check(model, plan)
    expected = model(batches[0]).logits
    sc.save(model, tmp_path / "out", plan=plan, reports=[report])
    for loaded in (sc.load(tmp_path / "out"), type(model).from_pretrained(tmp_path / "out")):
        assert torch.equal(loaded(batches[0]).logits, expected)
        sc.check(loaded, plan)


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_by_expert_the_model_computes_the_same(family: str) -> None:
    model, (ids,) = mixture(family), rows(1)
    expected, before = model(ids).logits, model.config._experts_implementation
    layers, seen = layers_of(model), set[str]()
    for name, layer in layers.items():
        if is_expert(layer):
            layer.register_forward_hook(lambda *_, name=name: seen.add(name))
    with torch.no_grad(), called_by_expert(layers):
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-6, rtol=1e-5)
    assert len(seen) == 2 * 2 * 4
    assert model.config._experts_implementation == before
    seen.clear()
    assert torch.equal(model(ids).logits, expected) and not seen


def test_wanda_of_an_expert_is_that_of_its_own_tokens() -> None:
    """Against the router's choice and the inputs that the model itself hands to its experts."""
    model, batches = mixture(), rows()
    experts = model.model.layers[0].mlp.experts
    taken: list[tuple[Tensor, Tensor]] = []
    handle = experts.register_forward_pre_hook(
        lambda module, args: taken.append((args[0].flatten(0, -2), args[1]))
    )
    names = [f"{FIRST}.gate_up_proj.{i}" for i in range(4)]
    with torch.no_grad():
        for ids in batches:
            model(ids)
    handle.remove()
    dense = copy.deepcopy(experts.gate_up_proj.detach())
    sc.prune_(model, sc.plan(model, "2:4", layers=names), sc.wanda, batches)
    for index in range(4):
        own = torch.cat([x[(chosen == index).any(-1)] for x, chosen in taken])
        mask = sc.NM(2, 4).mask(sc.wanda(dense[index], own.norm(dim=0)))
        assert torch.equal(experts.gate_up_proj[index].detach(), dense[index] * mask)


def test_an_expert_that_sees_few_tokens_is_lent_those_of_the_others() -> None:
    """H = sum over its own tokens + (n - own) x the mean over all tokens of the stack."""
    model, (ids,) = mixture(), rows(1)
    experts = model.model.layers[0].mlp.experts
    taken: list[tuple[Tensor, Tensor]] = []
    experts.register_forward_pre_hook(lambda module, args: taken.append((args[0], args[1])))
    layers = {n: m for n, m in layers_of(model).items() if n.startswith(f"{FIRST}.gate_up_proj")}
    with torch.no_grad():
        model(ids[:1])
    ((x, chosen),) = taken
    own = [x[(chosen == index).any(-1)] for index in range(4)]
    every = torch.cat(own)
    (seen,) = observe(model, layers, [ids[:1]], ["gram", "input_norm"], sequential=True)
    for index, name in enumerate(layers):
        lent = 4 * 16 - len(own[index])
        assert lent > 0 and seen.tokens[name] == len(own[index])
        gram = own[index].T @ own[index] + lent / len(every) * every.T @ every
        torch.testing.assert_close(seen.statistics[name]["gram"], gram / 64)
        torch.testing.assert_close(seen.statistics[name]["input_norm"], gram.diagonal().sqrt())


def test_an_expert_without_tokens_is_named_and_pruned_by_the_others_inputs() -> None:
    model, batches = mixture(), rows()
    router = model.model.layers[0].mlp.gate
    with torch.no_grad():
        router.weight[1:3] = router.weight[0]  # of three alike the first two are chosen
        router.weight[3] = -router.weight[0]
    plan = sc.plan(model, "2:4", layers=f"{FIRST}.*")
    report = sc.reconstruct_(model, plan, sc.sparsegpt, [batches[0][:, :1]])
    without = [result.note for result in report.layers if result.tokens == 0]
    assert without and set(without) == {"no token reached it: by the other experts' inputs"}
    assert not any(result.note for result in report.layers if result.tokens)
    assert sc.check(model, plan) == dict.fromkeys(plan.layers, 0.5)


@pytest.mark.parametrize("algorithm", [sc.sparsegpt, sc.alps], ids=lambda a: a.__name__)
def test_experts_are_reconstructed_from_their_own_tokens(algorithm: Any) -> None:
    model, batches = mixture(), rows()
    other = copy.deepcopy(model)
    plan = sc.plan(model, "2:4", layers="*.experts.*")
    report = sc.reconstruct_(model, plan, algorithm, batches)
    sc.check(model, plan)
    sc.prune_(other, plan, sc.magnitude)
    with torch.no_grad():
        dense, *pruned = (m(batches[0]).logits for m in (mixture(), model, other))
    errors = [float((logits - dense).square().mean()) for logits in pruned]
    assert errors[0] < errors[1]
    assert all(r.error is not None and 0 < r.error < 1 for r in report.layers)


def test_the_gradient_of_an_expert_is_its_part_of_the_stack_s() -> None:
    model, batches = mixture(), rows(2)
    found = gradients(model, layers_of(model), batches, ["gradient"])
    torch.stack([model(ids, labels=ids).loss for ids in batches]).mean().backward()
    for stack in ("gate_up_proj", "down_proj"):
        whole = model.get_parameter(f"{FIRST}.{stack}").grad
        for index in range(4):
            gradient = found[f"{FIRST}.{stack}.{index}"]["gradient"]
            torch.testing.assert_close(gradient, whole[index], atol=1e-6, rtol=1e-4)
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan, taylor, batches)
    sc.check(model, plan)


def test_what_raises_half_way_leaves_experts_as_they_were() -> None:
    model, batches = mixture(), rows()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = []

    def failing(weight: Tensor, input_norm: Tensor) -> Tensor:
        calls.append(weight)
        if len(calls) == 11:  # of 24 layers, after experts
            raise ValueError("enough")
        return sc.wanda(weight, input_norm)

    with pytest.raises(ValueError, match="enough"):
        sc.prune_(model, "2:4", failing, batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.config._experts_implementation == mixture().config._experts_implementation


def test_a_checkpoint_goes_on_with_experts(tmp_path: Path) -> None:
    model, other, batches = mixture(), mixture(), rows()
    plan = sc.plan(model, "2:4")
    sc.reconstruct_(model, plan, sc.sparsegpt, batches, checkpoint=tmp_path / "kept")
    sc.reconstruct_(other, plan, sc.sparsegpt, batches, checkpoint=tmp_path / "kept")
    again = other.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


def test_distillation_holds_the_zeros_of_experts() -> None:
    model, teacher, batches = mixture(), mixture(), rows()
    plan = sc.plan(model, "2:4")
    sc.prune_(model, plan)
    stack = model.model.layers[0].mlp.experts.down_proj
    before = stack.detach().clone()
    sc.distil_(model, teacher, batches, steps=3)
    assert sc.check(model, plan) == dict.fromkeys(plan.layers, 0.5)
    assert not torch.equal(stack.detach(), before)


def test_compensation_refuses_experts_that_were_pruned(tmp_path: Path) -> None:
    model, batches = mixture(), rows()
    sc.prune_(model, sc.plan(model, "2:4", layers="*.q_proj"))
    compensate(model, mixture(), batches, tmp_path / "fine", rank=2)
    sc.prune_(model, sc.plan(model, "2:4", layers=f"{FIRST}.down_proj.1"))
    with pytest.raises(ValueError, match=r"down_proj\.1 was pruned and cannot be compensated: it"):
        compensate(model, mixture(), batches, tmp_path / "refused", rank=2)


def test_experts_are_selected_by_name_and_glob() -> None:
    model = mixture()
    prefix = "model.layers.1.mlp.experts"
    assert list(sc.plan(model, "2:4", layers=f"{prefix}.down_proj.3").layers) == [
        f"{prefix}.down_proj.3"
    ]
    assert len(sc.plan(model, "2:4", layers="*.experts.down_proj.*").layers) == 8
    with pytest.raises(ValueError, match=r"to choose the layers inside it write '.*experts\.\*'"):
        sc.plan(model, "2:4", layers=prefix)
    found = {layer.layer: layer for layer in inspect(model).layers}
    assert found[f"{prefix}.gate_up_proj.2"].shape == (48, 16)


def test_a_model_that_was_moved_is_held_where_it_is_now() -> None:
    model, batches = mixture(), rows(1)
    plan = sc.plan(model, "2:4", layers="*.experts.*")
    sc.prune_(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sc.hold(model, optimizer):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        model(batches[0], labels=batches[0]).loss.backward()
        optimizer.step()
    sc.check(model, plan)


def test_a_module_without_stacks_has_no_experts() -> None:
    assert experts_of(nn.Linear(2, 2)) == {}
    assert not any(is_expert(m) for m in layers_of(gpt2_and_batches(1)[0]).values())
