"""The distance from the teacher, by kind of output, against hand-worked values."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from secateur.train.loss import WithTask, output_loss


def logits(*probabilities: list[float]) -> SimpleNamespace:
    return SimpleNamespace(logits=torch.tensor([list(probabilities)]).log())


def hidden(values: list[list[float]]) -> SimpleNamespace:
    return SimpleNamespace(last_hidden_state=torch.tensor([values]))


def test_logits_are_compared_by_divergence_of_counted_tokens() -> None:
    teacher = logits([0.75, 0.25], [0.5, 0.5], [0.9, 0.1])
    student = logits([0.5, 0.5], [0.5, 0.5], [0.1, 0.9])
    one = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # the other way round it is 0.14, not 0.13
    other = 0.9 * math.log(9) - 0.1 * math.log(9)
    assert float(output_loss(student, teacher, torch.zeros(1))) == pytest.approx((one + other) / 3)
    padded = {"attention_mask": torch.tensor([[1, 1, 0]])}
    assert float(output_loss(student, teacher, padded)) == pytest.approx(one / 2)


def test_hidden_states_are_compared_by_relative_error_and_pooled_cosine() -> None:
    teacher, student = hidden([[3.0, 0.0], [0.0, 4.0]]), hidden([[3.0, 0.0], [0.0, -4.0]])
    cosine = (9 - 16) / 25  # means (1.5, 2) and (1.5, -2)
    expected = 64 / 25 + 1 - cosine
    assert float(output_loss(student, teacher, torch.zeros(1))) == pytest.approx(expected)
    padded = {"attention_mask": torch.tensor([[1, 0]])}
    assert float(output_loss(student, teacher, padded)) == pytest.approx(0, abs=1e-6)


def test_a_plain_tensor_is_compared_by_relative_error() -> None:
    teacher, student = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])
    assert float(output_loss(student, teacher, torch.zeros(1))) == pytest.approx(4 / 5)
    assert float(output_loss(10 * student, 10 * teacher, torch.zeros(1))) == pytest.approx(4 / 5)
    assert float(output_loss(0 * student, 0 * teacher, torch.zeros(1))) == 0.0


def test_a_share_of_the_tasks_loss_is_that_of_the_next_token_or_of_labels() -> None:
    teacher = logits([0.75, 0.25], [0.5, 0.5])
    student = logits([0.5, 0.5], [0.1, 0.9])
    ids = torch.tensor([[0, 1]])
    divergence = float(output_loss(student, teacher, ids))
    expected = 0.25 * math.log(2) + 0.75 * divergence  # the first predicts the second, at 1/2
    assert float(WithTask(0.25)(student, teacher, ids)) == pytest.approx(expected)
    by_labels = SimpleNamespace(logits=student.logits, loss=torch.tensor(7.0))
    expected = 7 / 3 + 2 / 3 * divergence
    assert float(WithTask()(by_labels, teacher, {"input_ids": ids})) == pytest.approx(expected)
    assert float(WithTask(1.0)(student, teacher, ids)) == pytest.approx(math.log(2))
    pair = torch.ones(1, 3), torch.tensor([1])
    classes, taught = (SimpleNamespace(logits=x.logits[0, 1:]) for x in (student, teacher))
    expected = -0.5 * math.log(0.9) + 0.5 * float(output_loss(classes, taught, pair))
    assert float(WithTask(0.5)(classes, taught, pair)) == pytest.approx(expected)


def test_a_task_without_a_loss_and_no_share_are_refused() -> None:
    for share in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"WithTask needs a share in \(0, 1\], got"):
            WithTask(share)
    with pytest.raises(ValueError, match="needs a loss of the task, and SimpleNamespace has none"):
        WithTask()(hidden([[1.0]]), hidden([[1.0]]), torch.zeros(1, 1))


@pytest.mark.parametrize("kind", [logits, None])
def test_the_gradient_vanishes_at_the_teacher_and_points_to_it_elsewhere(kind: object) -> None:
    teacher = torch.tensor([[[0.2, 0.3, 0.5]]]).log()
    for start, sign in ((teacher.clone(), 0), (teacher + torch.tensor([0.0, 0.0, 0.1]), 1)):
        x = start.requires_grad_()
        pair = [SimpleNamespace(logits=t) if kind else t for t in (x, teacher)]
        output_loss(*pair, torch.zeros(1)).backward()
        assert isinstance(x.grad, Tensor)
        if sign:
            assert float(x.grad[0, 0, 2]) > 1e-3  # down the gradient is back to the teacher
        else:
            assert float(x.grad.abs().max()) < 1e-6


def test_outputs_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher's shape \(2, 3\), got \(2, 4\): give the model"):
        output_loss(torch.ones(2, 4), torch.ones(2, 3), torch.zeros(1))
    with pytest.raises(ValueError, match=r"this batch of the teacher gave 1 NaN of 1"):
        output_loss(torch.ones(1), torch.tensor([math.nan]), torch.zeros(1))
