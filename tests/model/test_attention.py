"""`nn.MultiheadAttention`: its projections are layers, and see what torch multiplies by them."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.criteria.taylor import taylor
from secateur.model.attention import is_attention, projections_of
from secateur.model.calibrate import observe
from secateur.model.layers import layers_of
from secateur.report.inspection import inspect

WIDTH, HEADS = 16, 4


class Across(nn.Module):
    """Attention whose queries, keys and values are three tensors."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found: Tensor = self.attention(value=value, query=query, key=key, need_weights=False)[0]
        return found


class Encoder(nn.Module):
    """Two of torch's encoder layers, which it runs without their modules where it can."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        found: Tensor = self.head(self.encoder(x, src_key_padding_mask=padding))
        return found


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


def sequences(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 9, WIDTH, generator=generator) for _ in range(count)]


def grams(model: nn.Module, batches: list[Any]) -> dict[str, Tensor]:
    """The Gram matrix of every layer, in the mean over its rows."""
    found: dict[str, Tensor] = {}
    for observed in observe(model, layers_of(model), batches, ["gram"], sequential=False):
        found |= {name: statistics["gram"] for name, statistics in observed.statistics.items()}
    return found


def gram(rows: Tensor) -> Tensor:
    rows = rows.double().reshape(-1, rows.shape[-1])
    return (rows.T @ rows / len(rows)).float()


def mixed(module: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(Q K^T / sqrt d) V of each head, [batch, tokens, width], in float64."""
    state = {name: p.double() for name, p in module.state_dict().items()}
    if "in_proj_weight" in state:
        weights = list(state["in_proj_weight"].split(WIDTH))
    else:
        weights = [state[f"{name}_proj_weight"] for name in "qkv"]
    biases = state["in_proj_bias"].split(WIDTH) if "in_proj_bias" in state else (0.0,) * 3
    heads = [
        (x.double() @ w.T + b).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for x, w, b in zip((q, k, v), weights, biases, strict=True)
    ]
    scores = heads[0] @ heads[1].mT / (WIDTH // HEADS) ** 0.5
    return (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 12, "vdim": 20}], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_each_projection_sees_its_own_input(options: dict[str, Any], batch_first: bool) -> None:
    torch.manual_seed(0)
    model = Across(batch_first=batch_first, **options).eval()
    widths = WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH)
    lengths = (5, 7, 7)
    batches = [
        tuple(torch.randn(3, n, w) for n, w in zip(lengths, widths, strict=True)) for _ in range(2)
    ]
    given = [tuple(x if batch_first else x.transpose(0, 1) for x in batch) for batch in batches]
    found = grams(model, given)
    packed = "kdim" not in options
    for i, name in enumerate("qkv"):
        layer = f"attention.in_proj_weight.{name}" if packed else f"attention.{name}_proj_weight"
        expected = gram(torch.cat([batch[i] for batch in batches]))
        torch.testing.assert_close(found[layer], expected, atol=1e-5, rtol=1e-5)
    seen = torch.cat([mixed(model.attention, *batch) for batch in batches])
    torch.testing.assert_close(found["attention.out_proj"], gram(seen), atol=1e-5, rtol=1e-5)
    assert len(found) == 4


def test_padding_does_not_stop_what_torch_would_run_nested() -> None:
    """torch hands its encoder a nested tensor then, which its modules cannot run one by one."""
    model, (x,) = encoder(), sequences(1)
    padding = torch.zeros(4, 9, dtype=torch.bool)
    padding[1, 5:] = True
    before = copy.deepcopy(model.state_dict())
    expected = model(x, padding)
    plan = sc.plan(model, "2:4")
    report = sc.prune_(model, plan, sc.wanda, [(x, padding)])
    assert {row.tokens for row in report.layers} == {36}
    assert not torch.equal(model(x, padding), expected)
    model.load_state_dict(before)
    assert torch.equal(model(x, padding), expected)


def test_while_it_is_observed_the_model_computes_the_same() -> None:
    model, (x,) = encoder(), sequences(1)
    with torch.no_grad():
        expected = model(x)
    seen: list[Tensor] = []
    for block in model.encoder.layers:
        block.self_attn.register_forward_hook(lambda *call: seen.append(call[2][0]))
    plain = [model(x), *seen]
    stages = observe(model, layers_of(model), [x], ["input_norm"], sequential=True)
    next(stages)
    assert not torch.backends.mha.get_fastpath_enabled()
    seen.clear()
    for one, two in zip(plain, [model(x), *seen], strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    stages.close()
    assert torch.backends.mha.get_fastpath_enabled()
    assert all("forward" not in vars(module) for module in model.modules())
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("verb", "method"),
    [
        (sc.prune_, sc.magnitude),
        (sc.prune_, sc.wanda),
        (sc.prune_, taylor),
        (sc.reconstruct_, sc.sparsegpt),
        (sc.reconstruct_, sc.alps),
        (sc.reconstruct_, sc.refit(sc.wanda)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_goes_the_whole_way(verb: Any, method: Any, tmp_path: Path) -> None:
    model, batches = encoder(), sequences()
    plan = sc.plan(model, "2:4")
    assert plan.coverage == (
        "planned 92.1% of 4,533 parameters; left dense are 7.9% (vectors: biases, norms and the "
        "like)"
    )
    assert len(plan.layers) == 2 * 6 + 1
    loss = {"loss": lambda output, batch: output.square().mean()} if method is taylor else {}
    report = verb(model, plan, method, batches, **loss)
    assert sc.check(model, plan) == dict.fromkeys(plan.layers, 0.5)
    assert type(model.encoder.layers[0].self_attn.in_proj_weight) is nn.Parameter
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with sc.hold(model, optimizer):
        model.train()(batches[0]).square().mean().backward()
        optimizer.step()
    model.eval()
    sc.check(model, plan)
    sc.save(model, tmp_path / "out", plan=plan, reports=[report])
    loaded = sc.load(tmp_path / "out", encoder())
    assert torch.equal(loaded(batches[0]), model(batches[0]))
    sc.check(loaded, plan)


def test_a_reconstruction_is_better_than_magnitude() -> None:
    torch.manual_seed(2)
    mix = torch.linspace(2, 0.02, WIDTH).diag() @ torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
    test, *batches = (x @ mix for x in sequences(9))
    dense = encoder()(test)
    plan = sc.plan(encoder(), "2:4", layers="*.self_attn.*")
    assert len(plan.layers) == 2 * 4
    lost = []
    for verb, method in ((sc.prune_, sc.magnitude), (sc.reconstruct_, sc.sparsegpt)):
        model = encoder()
        report = verb(model, plan, method, batches)
        lost.append(float((model(test) - dense).detach().square().sum()))
    assert lost[1] < 0.6 * lost[0]
    assert all(row.error is not None and 0 < row.error < 0.5 for row in report.layers)


def test_gradients_of_a_projection_are_its_third_of_the_parameter_s() -> None:
    from secateur.model.gradients import gradients

    model, batches = encoder(), sequences(2)
    layers = layers_of(model)
    found = gradients(model, layers, batches, ["gradient"], lambda y, _: y.square().mean())
    losses = torch.stack([model(x).square().mean() for x in batches])
    losses.mean().backward()
    whole = model.encoder.layers[1].self_attn.in_proj_weight.grad
    for name, expected in zip("qkv", whole.split(WIDTH), strict=True):
        torch.testing.assert_close(
            found[f"encoder.layers.1.self_attn.in_proj_weight.{name}"]["gradient"], expected
        )


def test_what_raises_half_way_puts_everything_back() -> None:
    model, batches = encoder(), sequences()
    before = copy.deepcopy(model.state_dict())

    def failing(weight: Tensor, input_norm: Tensor) -> Tensor:
        if len(weight) == 32:
            raise ValueError("enough")
        return sc.wanda(weight, input_norm)

    with pytest.raises(ValueError, match="enough"):
        sc.prune_(model, "2:4", failing, batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()
    assert all("forward" not in vars(module) for module in model.modules())


def test_attention_that_computes_something_else_is_left_alone_with_the_reason() -> None:
    class Gated(nn.MultiheadAttention):
        def forward(self, query: Tensor, *others: Any, **options: Any) -> Any:
            found, shares = super().forward(query, *others, **options)
            return query * found, shares

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Gated(WIDTH, HEADS))
    assert not is_attention(model[1]) and projections_of(model[1]) == {}
    plan = sc.plan(model, "2:4")
    assert list(plan.layers) == ["0"]
    assert plan.skipped == {
        "1.out_proj": "nn.MultiheadAttention reads its weight without calling it"
    }
    assert plan.left["parameters of Gated"] == 3 * WIDTH * WIDTH


def test_projections_that_share_a_parameter_are_skipped_and_named_it_is_an_error() -> None:
    model = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS) for _ in range(2))
    model[1].in_proj_weight = model[0].in_proj_weight
    plan = sc.plan(model, "2:4")
    assert list(plan.layers) == ["0.out_proj", "1.out_proj"]
    assert plan.skipped["0.in_proj_weight.q"] == "its weight is tied to 1.in_proj_weight"
    with pytest.raises(ValueError, match=r"tied to 0\.in_proj_weight"):
        sc.plan(model, "2:4", layers="1.in_proj_weight.v")


def test_they_are_selected_by_name_glob_and_type() -> None:
    model = encoder()
    one = "encoder.layers.1.self_attn.in_proj_weight.v"
    select = functools.partial(sc.plan, model, "2:4")
    assert list(select(layers=one).layers) == [one]
    assert len(select(layers="*.in_proj_weight.*").layers) == 6
    assert len(select(layers=nn.MultiheadAttention).layers) == 6
    assert all("in_proj" not in name for name in select(layers=nn.Linear).layers)
    found = {row.layer: row for row in inspect(model).layers}
    assert (found[one].kind, found[one].shape) == ("MultiheadAttention", (WIDTH, WIDTH))
