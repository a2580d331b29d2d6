"""What all tests share: quiet threads, and a way past the runtime type checks."""

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import settings

# More threads than cores make torch's barriers spin; the tests' tensors are small anyway.
torch.set_num_threads(1)

# No test asserts on time, hypothesis neither: a busy machine is no failure.
settings.register_profile("secateur", deadline=None)
settings.load_profile("secateur")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Runtime type checks are off: what a user without them would see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
