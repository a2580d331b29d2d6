"""Other libraries in the accuracy bench: how they are driven, and what their rows say.

The libraries are stand-ins: they are no dependency, not even of the tests.
"""

import copy
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from bench.lib.llama import TINY, random_llama
from bench.lib.peer_methods import PEERS, Peer
from bench.run import accuracy

pytest.importorskip("transformers")


SPARSEGPT, WANDA = "llm-compressor sparsegpt", "llm-compressor wanda"


MODELOPT = "modelopt sparsegpt"


def model_and_data() -> tuple[nn.Module, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(64, (4, 16), generator=generator)
    return random_llama(TINY, 16, "cpu").float(), list(rows.split(2))


def installed(monkeypatch: pytest.MonkeyPatch, name: str, members: dict[str, object]) -> None:
    """A module of this name, below packages that hold nothing else."""
    parts = name.split(".")
    modules = [ModuleType(".".join(parts[: end + 1])) for end in range(len(parts))]
    for parent, child in pairwise(modules):
        setattr(parent, child.__name__.rpartition(".")[2], child)
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(modules[-1]).update(members)


def halve(model: nn.Module, names: Iterable[str]) -> None:
    """Every second weight zero, and what a library leaves behind: a hook, other weights changed."""
    with torch.no_grad():
        for name in names:
            model.get_parameter(f"{name}.weight")[:, ::2] = 0
        model.get_parameter("model.embed_tokens.weight").zero_()
    model.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("method", "pattern", "structure"),
    [
        (SPARSEGPT, "2:4", ("2:4", 0.5)),
        (SPARSEGPT, "1:4", ("3:4", 0.75)),  # the zeros are counted, not what is kept
        (WANDA, "4:8", ("4:8", 0.5)),
        (WANDA, "unstructured:0.5@layer", ("0:0", 0.5)),
    ],
)
def test_llm_compressor_gets_the_pattern_the_layers_and_the_batches(
    method: str, pattern: str, structure: tuple[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = SimpleNamespace()

    def oneshot(model: nn.Module, recipe: Any, dataset: Any, tokenizer: object) -> None:
        seen.recipe, seen.batches = recipe, [batch["input_ids"] for batch in dataset]
        halve(model, recipe["targets"])

    def modifier(kind: str) -> Callable[..., dict[str, Any]]:
        return lambda **options: {"kind": kind, **options}

    modifiers = {"SparseGPTModifier": modifier("s"), "WandaPruningModifier": modifier("w")}
    installed(monkeypatch, "llmcompressor.modifiers.pruning", modifiers)
    vars(sys.modules["llmcompressor"])["oneshot"] = oneshot
    dense, data = model_and_data()
    model = copy.deepcopy(dense)
    plan = sc.plan(model, pattern)
    PEERS[method].prune(model, plan, data)
    assert seen.recipe == {
        "kind": "s" if method == SPARSEGPT else "w",
        "mask_structure": structure[0],
        "sparsity": structure[1],
        "targets": list(plan.layers),
    }
    assert all(map(torch.equal, seen.batches, data)) and len(seen.batches) == len(data)
    assert_taken(model, dense, plan)


def assert_taken(model: nn.Module, dense: nn.Module, plan: sc.Plan) -> None:
    """The layers have the library's weights, all else is as it was, and no hook came along."""
    for name, parameter in model.named_parameters():
        expected = dense.get_parameter(name).clone()
        if name.removesuffix(".weight") in plan.layers:
            expected.detach()[:, ::2] = 0
        assert torch.equal(parameter, expected), name
    assert not model._forward_hooks


def test_modelopt_gets_the_layers_and_a_loop_over_the_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = SimpleNamespace(batches=[])

    def sparsify(model: nn.Module, mode: Any, config: Any) -> nn.Module:
        ((seen.mode, rules),) = mode
        seen.rules = rules["nn.Linear"]
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _, args: seen.batches.append(args[0])
        )
        config["forward_loop"](model)
        halve(model, [name for name, rule in seen.rules.items() if rule is not None])
        return model

    members = {"sparsify": sparsify, "export": lambda model: model}
    installed(monkeypatch, "modelopt.torch.sparsity", members)
    dense, data = model_and_data()
    model = copy.deepcopy(dense)
    plan = sc.plan(model, "2:4")
    PEERS[MODELOPT].prune(model, plan, data)
    assert seen.mode == "sparsegpt"
    assert next(iter(seen.rules.items())) == ("*", None)  # later rules win
    assert all(map(torch.equal, seen.batches, data)) and len(seen.batches) == len(data)
    assert_taken(model, dense, plan)
    with pytest.raises(ValueError, match=r"ModelOpt prunes to 2:4 alone, got 4:8$"):
        PEERS[MODELOPT].prune(model, sc.plan(model, "4:8"), data)


def test_what_llm_compressor_does_not_have_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, "llmcompressor", {"oneshot": None})
    model, data = model_and_data()
    with pytest.raises(ValueError, match=r"llm-compressor has no block:8x8@0.5$"):
        PEERS[WANDA].prune(model, sc.plan(model, "block:8x8@0.5"), data)
    with pytest.raises(ValueError, match=r"llm-compressor takes transformers' models, got Linear$"):
        PEERS[WANDA].prune(nn.Linear(8, 8), sc.plan(nn.Linear(8, 8), "2:4"), data)


def test_an_absent_library_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llmcompressor", "modelopt"):
        monkeypatch.setitem(sys.modules, name, None)
    dense, data = model_and_data()
    rows = accuracy.measure(dense, "2:4", [*PEERS, "magnitude"], data, data)
    assert [row["method"] for row in rows] == ["dense", *PEERS, "magnitude"]
    for row in rows[1:4]:
        package = "modelopt" if row["method"] == MODELOPT else "llmcompressor"
        assert package in str(row["note"]) and set(row) == {"method", "note"}
    assert rows[4]["note"] == "" and rows[4]["r_m"] == 0 and rows[4]["library"] == ""


def test_zeros_that_do_not_fit_are_measured_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has the figures of what the library did; a method of ours must not do this."""

    def all_but_one(model: nn.Module, plan: sc.Plan, data: list[Tensor]) -> None:
        halve(model, list(plan.layers)[1:])

    monkeypatch.setitem(accuracy.METHODS, WANDA, all_but_one)
    monkeypatch.setitem(PEERS, WANDA, Peer("torch", all_but_one))
    dense, data = model_and_data()
    _, row = accuracy.measure(dense, "2:4", [WANDA], data, data)
    first = next(iter(sc.plan(dense, "2:4").layers))
    assert str(row["note"]).startswith(f"1 of 14 layers break the plan: {first} (2:4) ")
    assert float(row["dnll"]) != 0 and row["library"] == f"torch {version('torch')}"
    monkeypatch.setitem(accuracy.METHODS, "wanda", all_but_one)
    with pytest.raises(ValueError, match="1 of 14 layers break the plan"):
        accuracy.measure(dense, "2:4", ["wanda"], data, data)
