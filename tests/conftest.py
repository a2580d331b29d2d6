"""What all tests share: quiet threads, and a way past the runtime type checks."""

from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings

# More threads than cores make torch's barriers spin; the tests' tensors are small anyway.
torch.set_num_threads(1)

# No test asserts on time, nor does hypothesis: a busy machine is no failure.
settings.register_profile("secateur", deadline=None)
settings.load_profile("secateur")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Test ids without addresses: processes that share the tests have to collect the same ones."""
    if changing := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"give these tests ids of their own: {changing[:3]}")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turn runtime type checks off, as they are for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def no_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernels for a CPU were not compiled: plain torch runs."""
    monkeypatch.setenv("SECATEUR_CPU_BODY", "none")


@pytest.fixture(autouse=True)
def no_memory_of_other_tests(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Keep what `accelerate_` measures in a test for that test alone."""

    def own_file(name: str) -> Path:
        folder: Path = request.getfixturevalue("tmp_path")
        return folder / name

    monkeypatch.setattr("secateur.accelerate.measurements.own_file", own_file)
