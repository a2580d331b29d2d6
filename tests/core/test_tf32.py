"""Products in TF32: on a GPU inside the block alone."""

import pytest
import torch

from secateur.core.tf32 import in_tf32


def test_the_setting_is_put_back_whatever_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.backends.cuda.matmul
    before = own.fp32_precision
    with pytest.raises(KeyboardInterrupt), in_tf32(torch.device("cuda")):
        assert own.fp32_precision == "tf32"
        raise KeyboardInterrupt
    assert own.fp32_precision == before != "tf32"


def test_a_cpu_is_left_alone() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with in_tf32(torch.device("cpu")):
        assert torch.backends.cuda.matmul.fp32_precision == before
