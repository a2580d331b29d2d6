"""The small transformer learns its digits, the same each time."""

import torch

from bench.lib import digits


def test_training_learns_and_repeats() -> None:
    sizes, data = digits.Sizes(hidden=16, layers=1, heads=2, epochs=10), digits.digits(0)
    model, again = (digits.trained(sizes, data, 3) for _ in range(2))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert digits.top1(model, data) > 0.3  # chance is 0.1
    other = digits.digits(1)
    assert not torch.equal(data.labels, other.labels)
    assert len(data.pixels) + len(data.other_pixels) == 1797
