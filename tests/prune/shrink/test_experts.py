"""Which experts matter, against sums of this test's own, and a mixture without the others."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.criteria import wanda
from secateur.model.experts import experts_of
from secateur.model.layers import layers_of
from secateur.prune.shrink import shrink_
from secateur.prune.shrink.experts import inner_width, mixtures_of, rows_of_units, saliency
from secateur.reconstruct.scores import scores
from tests.prune.shrink.models import language_model, logits, rows


def outputs(experts: Any, x: Tensor) -> Tensor:
    """[tokens, experts, width]: what Mixtral's experts say of every token, in float64."""
    gate, up = torch.einsum("th,eoh->teo", x, experts.gate_up_proj.double()).chunk(2, -1)
    return torch.einsum("tei,ehi->teh", F.silu(gate) * up, experts.down_proj.double())


@torch.no_grad()
def test_the_saliency_is_the_mean_norm_of_what_an_expert_adds() -> None:
    model = language_model("Mixtral", num_hidden_layers=1)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    mixture = model.model.layers[0].mlp.experts
    handle = mixture.register_forward_pre_hook(lambda _, args: seen.append(args))
    scores, of_a_token = saliency(model, mixtures_of(model), rows())
    handle.remove()
    x, chosen, shares = (torch.cat(parts) for parts in zip(*seen, strict=True))
    norms = outputs(mixture, x.double()).norm(dim=-1)
    for expert in range(4):
        token, place = torch.where(chosen == expert)
        mean = (norms[token, expert] * shares[token, place]).mean()
        assert float(scores["model.layers.0.mlp.experts"][expert]) == pytest.approx(float(mean))
    assert of_a_token == 2


@torch.no_grad()
def test_an_expert_without_tokens_goes_first() -> None:
    model = language_model("Mixtral", num_hidden_layers=1)
    gate = model.model.layers[0].mlp.gate
    hook = gate.register_forward_hook(
        lambda module, args, out: (out[0], out[1], out[2].masked_fill(out[2] == 1, 3))
    )
    scores, _ = saliency(model, mixtures_of(model), rows())
    hook.remove()
    assert float(scores["model.layers.0.mlp.experts"][1]) == 0
    assert float(scores["model.layers.0.mlp.experts"].min()) == 0


class WithoutExperts(nn.Module):
    """Mixtral's router, which never sends a token to these experts."""

    def __init__(self, gate: Any, gone: list[int]) -> None:
        super().__init__()
        self.gate, self.gone = gate, gone

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = F.linear(x, self.gate.weight).index_fill(1, torch.tensor(self.gone), -torch.inf)
        top, chosen = found.softmax(-1).topk(self.gate.top_k)
        return found, top / top.sum(-1, keepdim=True), chosen


@torch.no_grad()
def test_tokens_go_to_the_best_of_the_experts_that_are_left() -> None:
    model = language_model("Mixtral")
    dense = copy.deepcopy(model)
    scores, _ = saliency(model, mixtures_of(model), rows())
    shrink_(model, rows(), experts=0.5)
    for layer, score in zip(dense.model.layers, scores.values(), strict=True):
        layer.mlp.gate = WithoutExperts(layer.mlp.gate, score.argsort()[:2].tolist())
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)


def test_as_many_of_each_group_stay() -> None:
    model = language_model("DeepseekV3")
    dense = copy.deepcopy(model)
    shrink_(model, rows(), experts=0.5)
    for big, small in zip(dense.model.layers[1:], model.model.layers[1:], strict=True):
        kept = [
            next(i for i, row in enumerate(big.mlp.gate.weight) if torch.equal(row, left))
            for left in small.mlp.gate.weight
        ]
        assert kept == sorted(kept) and [expert // 4 for expert in kept] == [0, 0, 1, 1]
        assert torch.equal(small.mlp.experts.down_proj, big.mlp.experts.down_proj[kept])
        bias = big.mlp.gate.e_score_correction_bias[kept]
        assert torch.equal(small.mlp.gate.e_score_correction_bias, bias)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_the_rows_of_a_unit_are_those_of_its_gate_and_of_itself(family: str) -> None:
    """Mixtral keeps gates and units in halves, GPT-OSS in turns."""
    mixture = next(iter(mixtures_of(language_model(family)).values()))
    units = inner_width(mixture)
    found = rows_of_units(mixture)
    if family == "Mixtral":
        assert torch.equal(found, torch.arange(2 * units).view(2, units))
    else:
        assert torch.equal(found, torch.arange(2 * units).view(units, 2).mT)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
@torch.no_grad()
def test_each_expert_loses_the_units_that_score_least_and_computes_the_rest(family: str) -> None:
    """Against the model with zeros in what read these units, and Wanda's scores of it."""
    model = language_model(family)
    dense, pieces = copy.deepcopy(model), dict[str, Any]()
    for name, mixture in mixtures_of(dense).items():
        pieces |= {f"{name}.{key}": p for key, p in experts_of(mixture).items() if "down" in key}
    report = shrink_(model, rows(), width=0.5, refit=False)
    assert len(report.removed) == len(pieces)
    expected = dict(scores(dense, pieces, wanda, rows(), None))
    for name, piece in pieces.items():
        total = expected[name].sum(0, dtype=torch.float64)
        going = total.argsort()[: len(total) // 2]
        piece.current()[:, going] = 0
        own = layers_of(model)[name].current()
        kept = [i for i in range(len(total)) if i not in going]
        assert torch.equal(own, piece.current()[:, kept])
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_reads_units_of_experts_is_refitted() -> None:
    lost = []
    for refit in (False, True):
        model = language_model("Mixtral")
        dense = logits(model)
        shrink_(model, rows(), width=0.5, refit=refit)
        lost.append(float((logits(model) - dense).square().mean()))
    assert lost[1] < lost[0]


def test_a_width_that_transformers_cannot_run_is_told_with_the_remedy() -> None:
    """Its product for all experts wants rows of whole 16 bytes: 6 numbers are no such row."""
    model = language_model("Qwen3Moe", moe_intermediate_size=12)
    before = model.state_dict()
    said = r"^experts of 6 hidden units cannot be run here: .*; choose a width that leaves a mult"
    with pytest.raises(ValueError, match=said):
        shrink_(model, rows(), width=0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
