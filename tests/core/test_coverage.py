"""Every parameter is accounted for, once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.core.coverage import EMBEDDINGS, EXPERTS, VECTORS, coverage, is_slight, left_alone
from secateur.formats.pack import packed_share


class TinyExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.ones(3, 8, 4))


class Model(nn.Module):
    """Tied ends, a layer, a stack of experts, an attention, and vectors."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.up = nn.Linear(8, 16)
        self.experts = TinyExperts()
        self.attention = nn.MultiheadAttention(8, 2)
        self.lm_head = nn.Linear(8, 10, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


def test_what_is_left_is_told_by_its_reason() -> None:
    left = left_alone(Model(), {"up.weight": 128}, {"attention.out_proj": "read uncalled"})
    assert left == {
        "parameters of MultiheadAttention": 3 * 64,
        EXPERTS: 96,
        EMBEDDINGS: 80,  # tied to the head, and counted once
        VECTORS: 16 + 24 + 8,
        "read uncalled": 64,
    } and list(left) == sorted(left, key=left.__getitem__, reverse=True)


@given(tied=st.booleans(), head=st.booleans())
def test_a_plan_accounts_for_every_parameter(tied: bool, head: bool) -> None:
    model = Model(tied)
    names = ["up", *(["lm_head"] if head and not tied else [])]
    plan = sc.plan(model, "unstructured:0.5", layers=names)
    assert plan.weights + sum(plan.left.values()) == sum(p.numel() for p in model.parameters())


def test_the_first_line_of_a_plan_says_which_share_it_has() -> None:
    plan = sc.plan(Model(), "2:4")
    projections = [f"in_proj_weight.{name}" for name in "qkv"] + ["out_proj"]
    assert list(plan.layers) == ["up", *(f"attention.{name}" for name in projections)]
    assert (
        str(plan).splitlines()[0]
        == plan.coverage
        == (
            "planned 63.2% of 608 parameters; left dense are 15.8% (experts: 3-D parameters, a "
            "matrix for each expert), 13.2% (embeddings), 7.9% (vectors: biases, norms and the "
            "like)"
        )
    )


def test_hardly_anything_is_said_first() -> None:
    assert coverage("planned", 9, {EXPERTS: 991, VECTORS: 1}).startswith("almost nothing: planned")
    assert not is_slight(10, {EXPERTS: 990, VECTORS: 10_000})
    model = Model()
    model.experts.down_proj = nn.Parameter(torch.ones(900, 8, 8))
    with pytest.warns(UserWarning, match=r"^almost nothing: planned 0\.7% of 58,112 parameters; "):
        sc.plan(model, "2:4")
    sc.plan(model, "2:4", layers="up")  # was meant


def test_packed_layers_count_as_the_weights_that_they_hold() -> None:
    model = Model()
    sc.prune_(model, "2:4")
    sc.pack_(model, "semi24", ["up"])
    assert packed_share(model).startswith("packed are 21.1% of 608 parameters; left dense are")
