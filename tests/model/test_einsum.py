"""XLNet's 3-D parameters: each matrix a layer that sees what `torch.einsum` multiplies by it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.criteria.taylor import taylor
from secateur.model.calibrate import observe
from secateur.model.einsum import heads_of
from secateur.model.layers import layers_of, matrix

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 48, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}
FIRST = "layer.0.rel_attn"


def xlnet() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.XLNetConfig(**SIZES, initializer_range=0.3)
    model: nn.Module = transformers.XLNetModel(config).eval()
    return model


def rows(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 48, (8, 12), generator=generator) for _ in range(count)]


def test_each_matrix_sees_what_it_multiplies() -> None:
    """Gram matrices of the first attention's input, of the positions', and of all heads' results.

    Those of `o` are told from what attention adds: with a norm of weight 1, o x is that sum.
    """
    model, (ids,) = xlnet(), rows(1)
    attention = model.get_submodule(FIRST)
    taken: list[tuple[Any, ...]] = []
    attention.register_forward_pre_hook(lambda module, args: taken.append(args))
    added: list[Tensor] = []
    attention.layer_norm.register_forward_pre_hook(lambda module, args: added.append(args[0]))
    layers = {f"{FIRST}.{n}": layers_of(model)[f"{FIRST}.{n}"] for n in "qkvro"}
    with torch.no_grad():
        model(ids)
    h, positions = taken[0][0].flatten(0, 1), taken[0][4].flatten(0, 1)
    projected = added[0].flatten(0, 1) - h
    (seen,) = observe(model, layers, [ids], ["gram"], sequential=False)
    grams = {name[-1]: found["gram"] for name, found in seen.statistics.items()}
    for name in "qkv":
        torch.testing.assert_close(grams[name], h.T @ h / len(h), atol=1e-5, rtol=1e-4)
    expected = positions.T @ positions / len(positions)
    torch.testing.assert_close(grams["r"], expected, atol=1e-5, rtol=1e-4)
    o = matrix(layers[f"{FIRST}.o"]).detach()
    energy = projected.T @ projected / len(projected)
    torch.testing.assert_close(o @ grams["o"] @ o.T, energy, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("verb", "method"),
    [(sc.prune_, sc.wanda), (sc.prune_, taylor), (sc.reconstruct_, sc.sparsegpt)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_goes_the_whole_way(verb: Any, method: Any, tmp_path: Path) -> None:
    model, batches = xlnet(), rows()
    plan = sc.plan(model, "2:4")
    assert len(plan.layers) == 2 * (5 + 2)
    loss = {"loss": lambda output, _: output[0].square().mean()} if method is taylor else {}
    verb(model, plan, method, batches, **loss)
    assert sc.check(model, plan) == dict.fromkeys(plan.layers, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with sc.hold(model, optimizer):
        model(batches[0])[0].square().mean().backward()
        optimizer.step()
    sc.check(model, plan)
    assert all("forward" not in vars(module) for module in model.modules())
    sc.save(model, tmp_path / "out", plan=plan)
    for loaded in (sc.load(tmp_path / "out"), type(model).from_pretrained(tmp_path / "out")):
        assert torch.equal(loaded(batches[0])[0], model(batches[0])[0])
        sc.check(loaded, plan)


def test_a_reconstruction_is_better_than_magnitude() -> None:
    dense, batches = xlnet(), rows(6)
    lost = []
    for verb, method in ((sc.prune_, sc.magnitude), (sc.reconstruct_, sc.sparsegpt)):
        model = copy.deepcopy(dense)
        verb(model, sc.plan(model, "2:4", layers="*.rel_attn.*"), method, batches[:4])
        with torch.no_grad():
            lost.append(sum(float((model(x)[0] - dense(x)[0]).square().sum()) for x in batches[4:]))
    assert lost[1] < 0.8 * lost[0]


def test_another_module_and_memory_that_is_no_view_have_none() -> None:
    assert heads_of(nn.Linear(2, 2)) == {}
    attention = xlnet().get_submodule(FIRST)
    attention.q = nn.Parameter(attention.q.detach().transpose(1, 2).contiguous().transpose(1, 2))
    assert list(heads_of(attention)) == ["k", "v", "r", "o"]
