"""What a weight that is not on a GPU is told: a remedy only where there is one."""

import pytest
import torch

from secateur.formats.kernels.gpu import why_no_gpu


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_a_machine_with_a_gpu_is_told_to_move_there(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = torch.device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_no_gpu(where) == "running it packed needs a CUDA GPU, and this machine has none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = f"running it packed needs a CUDA GPU, the weight is on {device}: move it there"
    assert why_no_gpu(where) == told
    assert why_no_gpu(torch.device("cuda", 1)) is None
