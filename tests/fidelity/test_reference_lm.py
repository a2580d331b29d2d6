"""Perplexity of a real language model: the order of methods, and the paper's algorithm. Slow."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from bench.lib.methods import paper
from secateur.integrations.tokens import end_of_text, token_rows
from secateur.integrations.transformers import load_folder
from secateur.model import evaluate

FOLDER = Path(__file__).parents[3] / "shared" / "models" / "reference-lm"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="the reference language model is not here"),
]


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return load_folder(FOLDER, torch.float32)


def nll(model: nn.Module) -> float:
    rows = token_rows(f"{FOLDER / 'tokens.safetensors'}:validation", 16, 4, end_of_text(FOLDER))
    return evaluate.perplexity(model, rows).nll


def test_methods_come_in_the_known_order_and_sparsegpt_is_the_papers(dense: nn.Module) -> None:
    calibration = token_rows(
        f"{FOLDER / 'tokens.safetensors'}:calibration", 8, 4, end_of_text(FOLDER)
    )
    found = {"dense": nll(dense)}
    for name, verb, method in (
        ("magnitude", sc.prune_, sc.magnitude),
        ("wanda", sc.prune_, sc.wanda),
        ("sparsegpt", sc.reconstruct_, sc.sparsegpt),
        ("paper", sc.reconstruct_, paper),
    ):
        model = copy.deepcopy(dense)
        plan = sc.plan(model, "2:4")
        verb(model, plan, method, calibration)
        sc.check(model, plan)
        found[name] = nll(model)
    assert found["dense"] < found["sparsegpt"] < found["wanda"] - 0.1 < found["magnitude"] - 0.2
    # 0.01 nll is 1 % of perplexity.
    assert found["sparsegpt"] == pytest.approx(found["paper"], abs=0.01)
