"""The bench of what pruning takes, end to end on a toy."""

from pathlib import Path

import pytest
import torch

from bench.lib import llama
from bench.run import cost
from tests.bench.rows import rows_of

pytest.importorskip("transformers")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_row_for_each_method(tmp_path: Path, streamed: bool) -> None:
    words = ["--model", "tiny", "--rows", "4", "--length", "16", "--batch", "2"]
    words += ["--methods", "sparsegpt", "alps", "--device", "cpu", "--output", str(tmp_path)]
    cost.main([*words, "--stream", str(tmp_path / "dense")] if streamed else words)
    rows = rows_of(tmp_path, "cost")
    assert [row["method"] for row in rows] == ["sparsegpt", "alps"]
    assert {(row["layers"], row["blocks"]) for row in rows} == {("14", "2")}
    assert {row["streamed"] for row in rows} == {str(streamed)}
    assert all(float(row["seconds"]) > 0 and 0 < float(row["error"]) < 1 for row in rows)
    assert float(rows[1]["error"]) < float(rows[0]["error"])
    assert not (tmp_path / "dense-sparse").exists()


def test_what_the_presets_announce_is_in_their_rows(tmp_path: Path) -> None:
    words = ["--model", "tiny", "--rows", "4", "--length", "16", "--batch", "2", "--device", "cpu"]
    words += ["--dtype", "float32", "--methods", "sparsegpt", "best", "--output", str(tmp_path)]
    cost.main(words)
    plain, best = rows_of(tmp_path, "cost")
    assert plain["announced"] == "" and float(best["announced"]) > 0
    assert {row["dtype"] for row in (plain, best)} == {"float32"}


def test_the_model_is_made_on_its_device_with_weights_from_a_seed() -> None:
    made: list[dict[str, torch.Tensor]] = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # of no consequence
        model = llama.random_llama(llama.TINY, 16, "cpu")
        made.append(model.state_dict())
    buffers = dict(model.named_buffers())
    expected = 10000.0 ** -(torch.arange(0, 16, 2) / 16)  # transformers' default base
    torch.testing.assert_close(buffers["model.rotary_emb.inv_freq"], expected)
    assert made[0].keys() == made[1].keys()
    for name, weight in made[0].items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, made[1][name])
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert float(weight.float().std()) == pytest.approx(llama.STD, rel=0.2)
