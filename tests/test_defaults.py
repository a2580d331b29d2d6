"""The process's defaults (dtype, device, inference mode) change no result."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.allocation import erk, owl
from secateur.formats.linear import describe, empty_from
from secateur.prune.permute import permute_
from secateur.reconstruct import estimate
from secateur.report.inspection import inspect
from secateur.train.movement import movement
from secateur.train.schedules import cubic
from tests.formats.weights import FORMATS, sparse_linear, tokens_in
from tests.llm.language import language_model, left_padded
from tests.models import Decoder


def ids(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(20, (4, 12), generator=generator, device="cpu") for _ in range(count)]


def made(make: Callable[[], Any]) -> Any:
    """The result of a process with unchanged defaults; without a change this is a no-op."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(), torch.device("cpu"), torch.inference_mode(False):
            torch.manual_seed(0)
            return make()
    finally:
        torch.set_default_dtype(before)


def decoder() -> Decoder:
    model: Decoder = made(lambda: Decoder(blocks=2).eval())
    return model


def pruned() -> Decoder:
    model = decoder()
    sc.prune_(model, "2:4")
    return model


def trained(attach: Callable[[nn.Module, torch.optim.Optimizer], Any]) -> nn.Module:
    model = pruned()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attach(model, optimizer)
    for batch in ids(4):
        model(batch).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def changed(verb: Callable[[nn.Module], Any], model: Decoder | None = None) -> dict[str, Any]:
    model = model or decoder()
    report = verb(model)
    return {**model.state_dict(), "report": getattr(report, "layers", None)}


def distilled() -> dict[str, Any]:
    model, teacher = pruned(), decoder()
    report = sc.distil_(model, teacher, ids(3), steps=3)
    return {**model.state_dict(), "losses": (report.first_loss, report.last_loss)}


def token_loss(model: nn.Module) -> float:
    return float(model(ids(1)[0]).float().square().mean())


def written() -> Tensor:
    model, (prompts, mask) = made(lambda: (language_model(), left_padded([3, 5])))
    return sc.generate(
        model,
        prompts,
        mask=mask,
        max_new_tokens=9,
        stop_ids=[7],
        temperature=1.0,
        top_p=0.9,
        seed=0,
    )


def of_format(format: str) -> dict[str, Any]:
    layer, x = made(lambda: (sparse_linear(format), tokens_in(5, 24)))
    again = empty_from(describe(layer))
    again.load_state_dict(layer.state_dict())
    return {"y": layer(x), "weight": layer.weight, "again": again(x)}


VERBS: dict[str, Callable[[], dict[str, Any]]] = {
    **{
        name: lambda m=method: changed(lambda model: sc.prune_(model, "2:4", m, ids(2)))
        for name, method in {
            "magnitude": sc.magnitude,
            "wanda": sc.wanda,
            "ria": sc.ria,
            "random": sc.criteria.random,
        }.items()
    },
    **{
        name: lambda m=method: changed(lambda model: sc.reconstruct_(model, "2:4", m, ids(4)))
        for name, method in {
            "sparsegpt": sc.sparsegpt,
            "alps": sc.alps,
            "refit": sc.refit(sc.wanda),
            "swap": sc.swap(sc.wanda),
            "best": sc.best,
            "thorough": sc.thorough,
            "thorough on a grid": replace(sc.thorough, grid=sc.Int4(8)),
        }.items()
    },
    "hold": lambda: trained(sc.hold).state_dict(),
    "gradual": lambda: trained(
        lambda m, o: sc.hold(m, o, sc.gradual(sc.plan(m, "unstructured:0.8"), cubic(0.8, 0, 4)))
    ).state_dict(),
    "movement": lambda: trained(
        lambda m, o: movement(m, sc.plan(m, "unstructured:0.8"), o, cubic(0.8, 0, 4))
    ).state_dict(),
    "distil_": distilled,
    "permute_": lambda: changed(lambda m: permute_(m, "2:4", sc.wanda, ids(2))),
    "sensitivity": lambda: {
        "found": sc.sensitivity(decoder(), ["2:4", "unstructured:0.7"], token_loss)
    },
    "erk": lambda: {"found": erk(decoder(), "unstructured:0.5")},
    "owl": lambda: {"found": owl(decoder(), "unstructured:0.5", ids(2))},
    "inspect": lambda: {"found": inspect(pruned())},
    "check": lambda: {"found": sc.check(pruned(), "2:4")},
    "estimate": lambda: {
        "bytes": estimate(
            m := decoder(), {"lm_head": m.lm_head}, {"lm_head": sc.NM(2, 4)}, ids(2)
        ).bytes,
    },
    "generate": lambda: {"ids": written()},
    **{f"format {format}": lambda f=format: of_format(f) for format in FORMATS},
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "inference_mode": torch.inference_mode,
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    return bool(one == other)


@pytest.mark.parametrize("verb", VERBS)
def test_defaults_change_no_result(verb: str) -> None:
    expected = VERBS[verb]()
    for name, default in DEFAULTS.items():
        if name == "inference_mode" and verb in ("hold", "gradual", "movement"):
            continue  # nothing can be trained inside it
        with default():
            found = VERBS[verb]()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert same(value, found[key]), f"{key} under {name}"


# A model of one layer, which sees its inputs before autocast rounds anything.
OF_ONE_LAYER: dict[str, Callable[[nn.Module, list[Tensor]], Any]] = {
    "wanda": lambda m, x: sc.prune_(m, "2:4", sc.wanda, x),
    "sparsegpt": lambda m, x: sc.reconstruct_(m, "2:4", sc.sparsegpt, x),
    "alps": lambda m, x: sc.reconstruct_(m, "2:4", sc.alps, x),
    "refit": lambda m, x: sc.reconstruct_(m, "2:4", sc.refit(sc.magnitude), x),
    "swap": lambda m, x: sc.reconstruct_(m, "2:4", sc.swap(sc.wanda), x),
    "alps on a grid": lambda m, x: sc.reconstruct_(m, "2:4", partial(sc.alps, grid=sc.Int4()), x),
}


@pytest.mark.parametrize("verb", OF_ONE_LAYER)
def test_autocast_rounds_nothing_that_is_the_library_s_own(verb: str) -> None:
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 16))
        batches = [torch.randn(64, 32) for _ in range(4)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            report = OF_ONE_LAYER[verb](model, batches)
        results.append((model[0].weight.detach(), report.layers))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
