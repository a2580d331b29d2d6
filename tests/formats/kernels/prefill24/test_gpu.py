"""The rounding kernel on a GPU: codes and scales are the definition's, bit for bit.

What the two kernels compute together is held to float64 in `tests/formats/test_dynamic_gpu.py`.
"""

import pytest
import torch

from secateur.formats.dynamic import quantised
from secateur.formats.kernels.prefill24 import why_not
from secateur.formats.kernels.prefill24.multiply import LARGEST_WIDTH, _quantise, items_of
from tests.formats.kernels.test_quantise import tokens_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("width", [16, 1024, 1296, 4096, LARGEST_WIDTH])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_codes_are_the_definitions(codes: torch.dtype, dtype: torch.dtype, width: int) -> None:
    """Beyond the tokens nothing is written."""
    x = tokens_of(width, dtype, "cuda").repeat(57, 1)
    problem = why_not((16, width), dtype, x.device)
    if problem is not None:
        pytest.skip(problem)
    found = torch.full((len(x) + 1, width), 77, dtype=torch.uint8, device="cuda")
    scales = torch.empty(len(x), device="cuda")
    launch = _quantise(x.device, codes, dtype, items_of(width), len(x))
    stream = torch.cuda.current_stream().cuda_stream
    launch(stream, x.data_ptr(), found.data_ptr(), scales.data_ptr(), width)
    wanted, wanted_scales = quantised(x.cpu(), codes)
    assert torch.equal(found[:-1].view(codes).cpu().float(), wanted.float())
    assert bool((found[-1] == 77).all())
    assert torch.equal(scales.cpu().nan_to_num(-1), wanted_scales[:, 0].nan_to_num(-1))
