"""What all tests share: quiet threads, and a way to pass what the type checker would refuse first."""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

# More threads than cores make torch's barriers spin; the tests' tensors are small anyway.
torch.set_num_threads(1)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Runtime type checks are off: what a user without them would see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
