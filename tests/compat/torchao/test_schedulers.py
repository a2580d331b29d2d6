"""Schedulers: levels by epoch, exact, up and down, saved without code."""

import pickle
import warnings

import pytest
import torch
from torch import nn

import secateur.compat.torchao as ao


def sparsifier(level: float = 0.5, layers: int = 1) -> ao.WeightNormSparsifier:
    made = ao.WeightNormSparsifier(level, (1, 1))
    made.prepare(nn.Sequential(*(nn.Linear(10, 10) for _ in range(layers))))
    return made


def levels(scheduler: ao.BaseScheduler, steps: int) -> list[float]:
    """The first group's level at construction and after each step."""
    seen = [scheduler.sparsifier.groups[0]["sparsity_level"]]
    for _ in range(steps):
        scheduler.sparsifier.step()
        scheduler.step()
        seen.append(scheduler.sparsifier.groups[0]["sparsity_level"])
    return seen


def test_construction_steps_to_epoch_0() -> None:
    made = sparsifier()
    scheduler = ao.LambdaSL(made, lambda epoch: epoch * 10)
    assert (scheduler.last_epoch, scheduler.base_sl, scheduler.get_last_sl()) == (0, [0.5], [0])
    assert made.groups[0]["sparsity_level"] == 0
    assert levels(scheduler, 2) == [0, 5.0, 10.0], "not clamped"
    assert scheduler.last_epoch == 2


def test_each_group_has_its_function() -> None:
    made = sparsifier(layers=2)
    ao.LambdaSL(made, [lambda epoch: 0.5, lambda epoch: 0.1], last_epoch=3)
    assert [group["sparsity_level"] for group in made.groups] == [0.25, 0.05]


def test_the_cubic_schedule_in_full() -> None:
    scheduler = ao.CubicSL(sparsifier(0.8), init_sl=0.0, delta_t=2, total_t=5)
    expected = [0, 0.2168, 0.3904, 0.5256, 0.6272, 0.7, 0.7488, 0.7784, 0.7936, 0.7992, 0.8, 0.8]
    assert levels(scheduler, 11) == pytest.approx(expected)


@pytest.mark.parametrize("initially_zero", [True, False])
def test_before_it_begins_the_level_is_the_initial_one_or_0(initially_zero: bool) -> None:
    scheduler = ao.CubicSL(
        sparsifier(0.8), init_sl=0.2, init_t=2, delta_t=1, total_t=1, initially_zero=initially_zero
    )
    before = 0.0 if initially_zero else 0.2
    assert levels(scheduler, 4) == pytest.approx([before, before, 0.2, 0.8, 0.8])


def test_a_cubic_schedule_may_fall() -> None:
    scheduler = ao.CubicSL(sparsifier(0.2), init_sl=0.8, delta_t=1, total_t=2)
    assert levels(scheduler, 3) == pytest.approx([0.8, 0.275, 0.2, 0.2])


def test_a_level_of_1_is_reached() -> None:
    assert levels(ao.CubicSL(sparsifier(1.0), delta_t=1, total_t=2), 2) == [0, 0.875, 1.0]


def test_every_setting_may_differ_between_groups() -> None:
    made = sparsifier(0.8, layers=2)
    scheduler = ao.CubicSL(made, init_sl=[0.0, 0.4], total_t=[1, 2], delta_t=1)
    made.step()
    scheduler.step()
    assert [g["sparsity_level"] for g in made.groups] == pytest.approx([0.8, 0.75])
    for wrong in ({"init_sl": [0.1]}, {"total_t": (1, 2, 3)}):
        with pytest.raises(
            ValueError, match=f"{next(iter(wrong))} needs a value for each of the 2"
        ):
            ao.CubicSL(made, **wrong)
    with pytest.raises(ValueError, match="sl_lambda needs a value for each of the 2 groups, got 1"):
        ao.LambdaSL(made, [lambda epoch: 1.0])
    with pytest.raises(ValueError, match="delta_t and total_t above 0, got 0 and 100"):
        ao.CubicSL(made, delta_t=0)


def test_a_step_lets_the_sparsifier_update_its_masks() -> None:
    made = sparsifier()
    scheduler = ao.LambdaSL(made, lambda epoch: 1.0)
    made.step()
    made.enable_mask_update = False
    scheduler.step()
    assert made.enable_mask_update


def test_the_wrong_order_warns_and_the_right_one_does_not() -> None:
    scheduler = ao.LambdaSL(sparsifier(), lambda epoch: 1.0)
    with pytest.warns(UserWarning, match="comes before the first sparsifier.step"):
        scheduler.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
        levels(ao.LambdaSL(sparsifier(), lambda epoch: 1.0), 3)


def test_a_state_has_no_code_and_goes_on_where_it_stood() -> None:
    made = sparsifier()
    scheduler = ao.LambdaSL(made, lambda epoch: 0.9**epoch)
    levels(scheduler, 3)
    state = pickle.loads(pickle.dumps(scheduler.state_dict()))
    assert "sparsifier" not in state and "sl_lambdas" not in state

    other = sparsifier(0.1)
    new = ao.LambdaSL(other, lambda epoch: 0.9**epoch)
    new.load_state_dict(state)
    assert (new.last_epoch, new.base_sl) == (3, [0.5])
    state["base_sl"][0] = 9.0
    assert new.base_sl == [0.5], "copied"
    new.step()
    scheduler.step()
    assert other.groups[0]["sparsity_level"] == made.groups[0]["sparsity_level"] == 0.5 * 0.9**4

    cubic = ao.CubicSL(made, init_sl=0.3)
    assert cubic.state_dict()["init_sl"] == [0.3]


def test_a_schedule_of_ones_own() -> None:
    class Halves(ao.BaseScheduler):
        def get_sl(self) -> list[float]:
            return [sl / 2**self.last_epoch for sl in self.base_sl]

    assert levels(Halves(sparsifier()), 2) == [0.5, 0.25, 0.125]

    class TooMany(ao.BaseScheduler):
        def get_sl(self) -> list[float]:
            return [0.1] * (1 + self.last_epoch)

    scheduler = TooMany(made := sparsifier())
    made.step()
    with pytest.raises(ValueError, match="a level for each of the 1 groups, got 2"):
        scheduler.step()
    assert (scheduler.last_epoch, made.groups[0]["sparsity_level"]) == (0, 0.1)


def test_what_is_scheduled_prints_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    made = sparsifier()
    scheduler = ao.LambdaSL(made, lambda epoch: 1.0, verbose=True)
    made.step()
    scheduler.step(epoch=7)
    assert capsys.readouterr().out == (
        "sparsity level of group 0 is 5.0000e-01\n"
        "epoch 7: sparsity level of group 0 is 5.0000e-01\n"
    )
    assert "last_epoch=1" in repr(scheduler)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_scheduled_is_an_error() -> None:
    made = sparsifier()
    with pytest.raises(TypeError, match="BaseScheduler needs a method get_sl"):
        ao.BaseScheduler(made)
    with pytest.raises(TypeError, match="needs a sparsifier of secateur.compat.torchao, got a"):
        ao.LambdaSL(torch.ao.pruning.WeightNormSparsifier(), lambda epoch: 1.0)
    with pytest.raises(ValueError, match="needs a prepared sparsifier: call prepare"):
        ao.CubicSL(ao.WeightNormSparsifier())
    band = ao.NearlyDiagonalSparsifier()
    band.prepare(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"groups with a sparsity_level, 0.weight has none"):
        ao.CubicSL(band)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", ["x", None, [0.5]])
def test_settings_of_another_kind_are_an_error_that_names_them(value: object) -> None:
    with pytest.raises(
        ValueError, match="LambdaSL needs functions of the epoch, got (0.5|'x'|None)"
    ):
        ao.LambdaSL(sparsifier(), value)
    for name in ("init_sl", "init_t", "delta_t", "total_t"):
        one = "x" if isinstance(value, list) else value
        with pytest.raises(ValueError, match=f"CubicSL needs {name} to be a number, got {one!r}"):
            ao.CubicSL(sparsifier(), **{name: one})
