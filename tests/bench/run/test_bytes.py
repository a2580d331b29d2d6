"""The bench of bits a weight: how bits are counted, what a recipe does, and the rows of a run."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import secateur as sc
from bench.lib.llama import TINY, random_llama
from bench.run import bytes as bench
from bench.run.bytes import DENSE, RECIPES, Answers, Recipe, apply_, bits_a_weight
from secateur.integrations.deal import Dealt
from secateur.model import evaluate
from secateur.patterns import Int2, Int3
from tests.bench.rows import rows_of

pytest.importorskip("transformers")
LENGTH = 16


@pytest.fixture(scope="module")
def model() -> nn.Module:
    dense = random_llama(TINY, LENGTH, "cpu").float()
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20)  # so that layers count beside the residual stream
    return dense


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(1, 64, (8, LENGTH), generator=generator).split(2))


@pytest.mark.parametrize(
    ("recipe", "bits"),
    [
        ("dense bfloat16", 16),
        ("dense int4, gptq", 4.125),
        ("dense int3, nearest", 3.125),
        ("dense int2, gptq", 2.125),
        ("2:4 int4, sparsegpt", 2 + 1 + 0.125),
        ("4:8 int4, sparsegpt", 2 + 7 / 8 + 0.125),  # 70 choices in 7 bits
        ("unstructured:0.5@layer int4, sparsegpt", 2 + 1 + 0.125),
        ("2:4 bfloat16, sparsegpt", 8 + 1),
        ("4:8 bfloat16, sparsegpt", 8 + 7 / 8),
        ("unstructured:0.5@layer bfloat16, sparsegpt", 8 + 1),
        ("block:64x64@0.5 bfloat16, sparsegpt", 8 + 16 / 4096),
    ],
)
def test_codes_positions_and_scales_are_counted(recipe: str, bits: float) -> None:
    assert bits_a_weight(RECIPES[recipe], [(8, 512), (512, 1408)]) == bits


def test_a_last_shorter_group_has_a_scale_of_its_own() -> None:
    shapes = [(3, 130), (5, 128)]
    scales = 16 * (3 * 2 + 5) / (3 * 130 + 5 * 128)
    assert bits_a_weight(RECIPES["dense int4, gptq"], shapes) == pytest.approx(4 + scales)
    one = Recipe(sc.Unstructured(0.0), Int3(None))
    assert bits_a_weight(one, [(3, 128)]) == 3 + 16 / 128


def test_2_4_is_counted_as_it_is_packed() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = nn.Linear(256, 16, bias=False).bfloat16()
    layer.weight = nn.Parameter(weight)
    for format, recipe in (("semi24", "2:4 bfloat16"), ("semi24_int4", "2:4 int4")):
        packed = nn.Sequential(copy.deepcopy(layer))
        sc.prune_(packed, "2:4")
        sc.pack_(packed, format)
        stored = sum(t.numel() * t.element_size() for t in packed.state_dict().values())
        assert 8 * stored / (16 * 256) == bits_a_weight(
            RECIPES[f"{recipe}, sparsegpt"], [(16, 256)]
        )


def test_other_patterns_are_not_guessed() -> None:
    with pytest.raises(ValueError, match=r"of N:M, blocks and unstructured, got channels:0\.5"):
        bits_a_weight(Recipe(sc.Channel(0.5), None), [(8, 8)])


@pytest.mark.parametrize("name", bench.UNWRITTEN)
def test_a_recipe_gives_its_zeros_and_its_numbers(
    name: str, model: nn.Module, batches: list[Tensor]
) -> None:
    recipe, copied = RECIPES[name], copy.deepcopy(model)
    if isinstance(recipe.pattern, sc.Block):  # as small as this model's layers
        recipe = replace(recipe, pattern=replace(recipe.pattern, rows=16, cols=16))
    plan = apply_(copied, recipe, batches)
    assert len(plan.layers) == 14
    sc.check(copied, plan)
    for layer in plan.layers:
        weight = copied.get_parameter(f"{layer}.weight")
        stored = weight.detach().bfloat16()
        assert torch.equal(stored.float(), weight)
        if recipe.grid is not None:
            scales = recipe.grid.scales(stored)
            codes = recipe.grid.codes(stored, scales)
            assert int(codes.abs().max()) <= 2 ** (recipe.grid.bits - 1) - 1
            assert torch.equal(recipe.grid.dequantised(codes, scales).bfloat16(), stored)
    assert torch.equal(copied.lm_head.weight, model.lm_head.weight)


def test_a_pattern_that_a_layer_cannot_have_is_refused(
    model: nn.Module, batches: list[Tensor]
) -> None:
    copied = copy.deepcopy(model)
    with pytest.raises(
        ValueError, match=r"20:64 int4, sparsegpt does not fit layer model\.layers\."
    ):
        apply_(copied, Recipe(sc.NM(20, 64), sc.Int4()), batches)
    assert all(map(torch.equal, copied.parameters(), model.parameters()))


def test_figures_are_those_of_evaluate(model: nn.Module, batches: list[Tensor]) -> None:
    copied = copy.deepcopy(model)
    apply_(copied, Recipe(sc.Unstructured(0.0), Int2()), batches)
    found = bench.figures(copied, Answers(model, batches), batches)
    agreement = evaluate.compare(copied, model, batches)
    nll, best = (evaluate.perplexity(one, batches).nll for one in (copied, model))
    assert found["nll"] == pytest.approx(nll, rel=1e-6)
    assert found["dnll"] == pytest.approx(nll - best, abs=1e-5)
    assert found["kl"] == pytest.approx(agreement.kl, rel=1e-5) and found["kl"] > 0.01
    assert found["top1"] == agreement.top1
    with pytest.raises(ValueError, match="none of the batches"):
        Answers(model, batches)(batches[0] + 1)


@pytest.fixture
def words(tmp_path: Path, batches: list[Tensor]) -> list[str]:
    """The options of a run on a small model."""
    folder = tmp_path / "lm"
    random_llama(TINY, LENGTH, "cpu").save_pretrained(folder)
    rows = torch.cat(batches)
    save_file({"calibration": rows, "validation": rows.clone()}, folder / "tokens.safetensors")
    options = ["--model", str(folder), "--rows", "4", "--validation", "6", "--batch", "2"]
    return [*options, "--device", "cpu", "--output", str(tmp_path), "--recipes"]


def test_a_run_writes_a_row_for_each_recipe(
    tmp_path: Path,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As they come: those before an end stay, and a second run goes on in the same file."""
    monkeypatch.setitem(RECIPES, "ended", Recipe(sc.NM(20, 64), None))
    with pytest.raises(ValueError, match="leave the recipe out"):
        bench.main([*words, "dense int2, gptq", "ended", DENSE.name])
    bench.main([*words, "dense int2, gptq", "2:4 int4, sparsegpt"])
    found = rows_of(tmp_path, "bytes")
    assert [row["recipe"] for row in found] == ["dense int2, gptq", "2:4 int4, sparsegpt"]
    asked = ("model", "calibration_rows", "validation_rows", "batch", "seed", "written")
    assert {tuple(row[name] for name in asked) for row in found} == {
        ("lm", "4", "6", "2", "0", "0")
    }
    told = [line for line in capsys.readouterr().out.splitlines() if "dense int2" in line]
    assert told[0].startswith("dense int2, gptq: 2.444 bits a weight, ")
    assert told[1:] == ["dense int2, gptq: its row is there"]
    assert float(found[0]["kl"]) > 0 and float(found[0]["nll"]) > 0
    bench.main([*words[:-1], "--seed", "1", "--recipes", "dense int2, gptq"])
    assert len(rows_of(tmp_path, "bytes")) == 3  # another case


def test_written_rows_stand_beside_the_calibration_rows(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written once, as many as any recipe needs, by the dense model as it is stored."""
    some, all_of_them = (Recipe(sc.Unstructured(0.0), Int3(), written=rows) for rows in (3, 5))
    given: list[list[Tensor]] = []
    wrote: list[tuple[torch.dtype, int]] = []

    def apply(model: nn.Module, recipe: Recipe, data: list[Tensor]) -> sc.Plan:
        given.append(data)
        return apply_(model, recipe, data)

    def sampled(model: nn.Module, batches: list[Tensor], rows: int, **options: int) -> list[Tensor]:
        wrote.append((next(model.parameters()).dtype, rows))
        return list(torch.arange(rows * LENGTH).view(rows, LENGTH).remainder(64).split(2))

    for recipe in (some, all_of_them):
        monkeypatch.setitem(RECIPES, recipe.name, recipe)
    monkeypatch.setattr(bench, "apply_", apply)
    monkeypatch.setattr(bench, "sampled_rows", sampled)
    bench.main([*words, some.name, all_of_them.name])
    assert wrote == [(torch.bfloat16, 5)]
    assert [[len(batch) for batch in data] for data in given] == [[2, 2, 2, 1], [2, 2, 2, 2, 1]]
    assert torch.equal(torch.cat(given[1])[4:7], torch.cat(given[0])[4:])
    rows = rows_of(tmp_path, "bytes")
    assert [row["recipe"] for row in rows] == [
        "dense int3, gptq, 3 written rows",
        "dense int3, gptq, 5 written rows",
    ]
    assert [row["written"] for row in rows] == ["3", "5"]


def test_texts_of_another_kind_have_columns(
    tmp_path: Path, words: list[str], model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = torch.randint(1, 64, (4, LENGTH), generator=torch.Generator().manual_seed(2))
    asked: list[tuple[object, ...]] = []

    def text_rows(folder: Path, text: str, rows: int, length: int, batch: int) -> Dealt:
        asked.append((folder.name, text, rows, length, batch))
        return Dealt(list(other.split(2)), (0, 1, 2, 3), 4, rows, "rows", "more")

    monkeypatch.setattr(bench, "text_rows", text_rows)
    bench.main([*words[:-1], "--others", "prose=a/folder", "--recipes", "dense int2, gptq"])
    assert asked == [("lm", "a/folder", bench.OTHERS, LENGTH, 2)]
    (row,) = rows_of(tmp_path, "bytes")
    assert float(row["kl_prose"]) > 0 and row["kl_prose"] != row["kl"]
