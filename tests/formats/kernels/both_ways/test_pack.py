"""Packing both ways on a GPU, to the bit as the reference, and what it refuses."""

import pytest
import torch
from torch import Tensor

from secateur.formats.kernels import gpu as gpu_checks
from secateur.formats.kernels.both_ways import Selection, pack, reference, why_not
from secateur.formats.kernels.both_ways.reference import kept
from tests.formats.kernels.both_ways.test_reference import dense, random_weight

GPU = torch.device("cuda:0")
DTYPES = (torch.bfloat16, torch.float16)
SHAPES = ((64, 64), (128, 128), (192, 320), (1024, 2048))
ROUNDING = 2.0**-21  # of a float32 sum of eight
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_what_it_cannot_run_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs a CUDA GPU" in (why_not((64, 64), torch.bfloat16, torch.device("cpu")) or "")
    monkeypatch.setattr(gpu_checks.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_checks.torch.cuda, "get_device_capability", lambda _: (7, 5))

    def reason(shape: tuple[int, int], dtype: torch.dtype) -> str:
        return why_not(shape, dtype, GPU) or ""

    assert reason((64, 64), torch.float32) == (
        "packing both ways needs bfloat16 or float16, got torch.float32: train under torch.autocast"
    )
    assert reason((64, 96), torch.bfloat16) == (
        "packing both ways needs out_features and in_features that are multiples of 64, "
        "got 64 x 96: pad the layer with zeros"
    )
    assert "needs compute capability 8.0, this GPU has 7.5" in reason((64, 64), torch.bfloat16)


def packed(weight: Tensor, dtype: torch.dtype, selection: Selection) -> tuple[Tensor, Tensor]:
    """Both packs, into memory that held other bytes."""
    poison = [torch.full_like(part, 0xAA) for part in pack(weight, dtype, selection)]
    del poison
    return pack(weight, dtype, selection)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("is_coarse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("selection", Selection, ids=str)
def test_packs_are_the_references(
    selection: Selection, dtype: torch.dtype, is_wide: bool, shape: tuple[int, int], is_coarse: bool
) -> None:
    weight = random_weight(shape, 1, is_coarse).to(torch.float32 if is_wide else dtype)
    found = [part.cpu() for part in packed(weight.cuda(), dtype, selection)]
    if selection is Selection.ROWS or is_coarse or not is_wide:
        wanted = reference.pack(weight, dtype, selection)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
        return
    # of masks that differ by the rounding of a sum alone either is right
    chosen = dense(found[0], shape[1], dtype) != 0
    assert torch.equal(dense(found[1], shape[0], dtype).t() != 0, chosen)
    sizes = weight.abs().double()
    best, _ = kept(weight, selection)
    worth, most = (
        (sizes * mask).unfold(0, 4, 4).unfold(1, 4, 4).sum((2, 3)) for mask in (chosen, best)
    )
    assert ((most - worth) <= ROUNDING * most).all()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("selection", Selection, ids=str)
def test_what_is_not_finite_stays(selection: Selection, dtype: torch.dtype) -> None:
    weight = random_weight((64, 128), 2).to(dtype)
    at = torch.tensor([3, 17, 63]), torch.tensor([5, 22, 127])
    weight[at] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    units, transposed = (part.cpu() for part in packed(weight.cuda(), dtype, selection))
    assert dense(units, 128, dtype)[at].isfinite().logical_not().all()
    assert dense(transposed, 64, dtype).t()[at].isfinite().logical_not().all()
