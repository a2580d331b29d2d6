"""What all tests share: quiet threads, and a way past the runtime type checks."""

from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings

# More threads than cores make torch's barriers spin; the tests' tensors are small anyway.
torch.set_num_threads(1)

# No test asserts on time, hypothesis neither: a busy machine is no failure.
settings.register_profile("secateur", deadline=None)
settings.load_profile("secateur")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Processes that share the tests have to find the same ones: no address in a name."""
    if changing := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"give these tests ids of their own: {changing[:3]}")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Runtime type checks are off: what a user without them would see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def no_memory_of_other_tests(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """What `accelerate_` measures in a test is kept for that test alone."""

    def own_file(name: str) -> Path:
        folder: Path = request.getfixturevalue("tmp_path")
        return folder / name

    monkeypatch.setattr("secateur.accelerate.measurements.own_file", own_file)
