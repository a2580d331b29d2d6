"""Autocast: which dtype it rounds to, asked so that every supported compiler follows."""

from typing import Any

import pytest
import torch

from secateur.core.autocast import autocast_dtype, without_autocast

CPU = torch.device("cpu")


def test_the_dtype_is_the_one_that_the_user_chose() -> None:
    assert autocast_dtype(CPU) is None
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert autocast_dtype(CPU) is dtype
            with without_autocast(CPU):
                assert autocast_dtype(CPU) is None
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_device_without_autocast_has_none() -> None:
    assert autocast_dtype(torch.device("meta")) is None


def test_a_cpu_and_a_gpu_are_not_asked_what_the_oldest_compiler_cannot_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch 2.11 breaks the graph at `is_autocast_available`."""

    def asked(*_: Any) -> bool:
        raise AssertionError

    monkeypatch.setattr(torch.amp.autocast_mode, "is_autocast_available", asked)
    assert autocast_dtype(CPU) is None
    assert autocast_dtype(torch.device("cuda")) is None
    with pytest.raises(AssertionError):
        autocast_dtype(torch.device("meta"))
