"""Methods by name: what is exported is one, with its options."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import secateur as sc
from secateur import criteria, reconstruct
from secateur.cli.methods import algorithms_by_name, find_method
from secateur.model.statistics import name_of
from secateur.patterns import Int2, Int3
from secateur.patterns.grids import Grid
from tests.cli.shell import run, said, weights


def test_prune_s_help_lists_every_method() -> None:
    text = " ".join(said(run("prune", "--help")).replace("│", " ").split())
    assert "magnitude, magnitude_l2, random, ria, snip" in text and "sparsegpt" in text
    assert "'best' is 'blockwise(alps)'" in text


@pytest.mark.parametrize("module", [criteria, reconstruct])
def test_every_exported_function_is_a_method(module: Any) -> None:
    functions = [n for n in module.__all__ if not isinstance(vars(module)[n], type)]
    # They take a method, a mask, or a model that is pruned already.
    others = ("refit", "refitted", "swap", "swapped", "blockwise", "compensate", "compensation")
    others += ("estimate", "low_rank_part")  # one takes what the preset does, one gives factors
    functions = [n for n in functions if n not in others]
    assert functions
    for name in functions:
        method = find_method(name)
        assert method.function is vars(module)[name] and method.refits == (module is reconstruct)


def test_options_have_the_type_of_their_default() -> None:
    function = find_method("sparsegpt", ["damping=1"]).function
    assert isinstance(function, partial)
    assert function.keywords == {"damping": 1.0} and type(function.keywords["damping"]) is float


def test_refit_is_a_method_with_the_mask_of_another() -> None:
    method = find_method("refit(wanda)", ["damping=0.1"])
    assert method.refits and sorted(method.needs) == ["gram", "input_norm"]
    assert name_of(method.function) == "refit(wanda, damping=0.1)"
    assert find_method("refit(sparsegpt)").needs == ("gram", "held_gram")
    with pytest.raises(ValueError, match="unknown method 'low_rank_part'"):
        find_method("low_rank_part")
    with pytest.raises(ValueError, match="unknown method 'wand': did you mean 'wanda'"):
        find_method("refit(wand)")
    with pytest.raises(ValueError, match=r"refit\(wanda\) has no option 'once=1': .* damping=None"):
        find_method("refit(wanda)", ["once=1"])


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("int4", sc.Int4()),
        ("int4:64", sc.Int4(64)),
        ("int4:channel", sc.Int4(None)),
        ("int3", Int3()),
        ("int2:32", Int2(32)),
        ("int8", sc.Int8()),
        ("fp8", sc.Fp8()),
    ],
)
def test_a_grid_is_an_option_by_its_short_string(text: str, grid: Grid) -> None:
    for name in ("sparsegpt", "alps"):
        assert find_method(name, [f"grid={text}"]).function.keywords == {"grid": grid}
    for name, preset in (("best", sc.best), ("thorough", sc.thorough)):
        found = find_method(name, [f"grid={text}"])
        assert found.function == replace(preset, grid=grid) and found.refits
        assert found.function.name.endswith(f"grid={grid!r})")
    assert find_method("blockwise(wanda)", [f"grid={text}", "epochs=2"]).function.grid == grid
    assert name_of(find_method("refit(ria)", [f"grid={text}"]).function) == (
        f"refit(ria, grid={grid!r})"
    )


def test_what_is_no_grid_is_said_with_those_there_are() -> None:
    for text in ("int5", "int8:64", "int4:", "int4:x", "Int4()", ""):
        with pytest.raises(
            ValueError, match=f"int4, int3, int2, int8 or fp8, got '{re.escape(text)}'"
        ):
            find_method("best", [f"grid={text}"])
    with pytest.raises(ValueError, match="Int4 needs a group_size of at least 1, got 0"):
        find_method("alps", ["grid=int4:0"])


def test_swap_is_a_method_that_betters_the_mask_of_another() -> None:
    method = find_method("swap(wanda)")
    assert method.refits and sorted(method.needs) == ["gram", "input_norm"]
    assert name_of(find_method("refit(swap(ria))", ["damping=0.1"]).function) == (
        "refit(swap(ria), damping=0.1)"
    )
    assert "swapped" not in algorithms_by_name() and "sparsegpt" in algorithms_by_name()
    with pytest.raises(ValueError, match=r"swap\(wanda\) has no option 'damping=1': .* none"):
        find_method("swap(wanda)", ["damping=1"])


def test_blockwise_is_a_method_that_trains_after_another() -> None:
    method = find_method("blockwise(refit(wanda))", ["epochs=2"])
    assert method.refits and sorted(method.needs) == ["gram", "held_gram", "input_norm"]
    assert method.function.name == "blockwise(refit(wanda), epochs=2)"
    with pytest.raises(ValueError, match=r"blockwise\(alps\) has no option 'damping=1': .* epochs"):
        find_method("blockwise(alps)", ["damping=1"])


@pytest.mark.parametrize(
    ("name", "function"),
    [("best", sc.blockwise(sc.alps)), ("thorough", sc.blockwise(sc.alps, distil=4))],
)
def test_a_preset_is_a_method_whose_one_option_is_a_grid(name: str, function: Any) -> None:
    method = find_method(name)
    assert method.function == function and method.refits
    assert method.needs == ("gram", "held_gram")
    with pytest.raises(ValueError, match=f"{name} has no option 'epochs=1': .* has grid=None$"):
        find_method(name, ["epochs=1"])


def test_a_preset_s_name_is_guessed() -> None:
    with pytest.raises(ValueError, match="unknown method 'bst': did you mean 'best'"):
        find_method("bst")


def test_what_the_library_gives_is_no_option() -> None:
    assert find_method("alps", ["damping=1"]).function.keywords == {"damping": 1.0}
    with pytest.raises(ValueError, match="alps needs a float for damping, got 'much': it is None"):
        find_method("alps", ["damping=much"])
    with pytest.raises(
        ValueError, match=r"alps has no option 'once=1': .* damping=None, grid=None$"
    ):
        find_method("alps", ["once=1"])


def test_a_new_criterion_works_by_being_exported(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def smallest(weight: Tensor) -> Tensor:
        return -weight.abs()

    monkeypatch.setattr(criteria, "__all__", [*criteria.__all__, "smallest"])
    monkeypatch.setattr(criteria, "smallest", smallest, raising=False)
    said(run("prune", dense, "-o", tmp_path / "out", "-p", "2:4", "-m", "smallest"))
    before, after = weights(dense), weights(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    groups = before[name].float().abs().view(-1, 4)
    kept = groups <= groups.kthvalue(2, dim=1, keepdim=True).values
    assert bool((kept.sum(1) >= 2).all())
    assert bool(((after[name].view(-1, 4) != 0) <= kept).all())
