"""The rounding kernel on a GPU: codes and scales are the definition's, bit for bit.

What the two kernels compute together is held to float64 in `tests/formats/test_dynamic_gpu.py`.
"""

import pytest
import torch
from torch import Tensor

from secateur.formats.dynamic import quantised
from secateur.formats.prefill24 import why_not
from secateur.formats.prefill24.arrange import COLUMNS
from secateur.formats.prefill24.multiply import LARGEST_WIDTH, TOKENS, _quantise, items_of
from tests.kernels.test_quantise import tokens_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def unpermuted(tiles: Tensor) -> Tensor:
    """Tiles `[token tiles, blocks, 256, 8, 16]` as rows; piece p of token i lies at p ^ (i % 8)."""
    pieces, tokens = torch.arange(8), torch.arange(TOKENS)[:, None]
    place = (pieces ^ (tokens % 8)).to(tiles.device)
    plain = tiles.gather(3, place[:, :, None].expand_as(tiles))
    return plain.transpose(1, 2).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("width", [16, 1024, 1296, 4096, LARGEST_WIDTH])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_codes_are_the_definitions(codes: torch.dtype, dtype: torch.dtype, width: int) -> None:
    """In the third tile there is one token; beyond the last column there are zeros."""
    x = tokens_of(width, dtype, "cuda").repeat(57, 1)  # 9 x 57 = 2 x 256 + 1
    problem = why_not((16, width), dtype, x.device)
    if problem is not None:
        pytest.skip(problem)
    blocks = -(-width // COLUMNS)
    tiles = torch.full((3, blocks, TOKENS, 8, 16), 77, dtype=torch.uint8, device="cuda")
    scales = torch.empty(len(x), device="cuda")
    launch = _quantise(x.device, codes, dtype, items_of(width), len(x))
    stream = torch.cuda.current_stream().cuda_stream
    launch(stream, x.data_ptr(), tiles.data_ptr(), scales.data_ptr(), width, blocks)
    wanted, wanted_scales = quantised(x.cpu(), codes)
    found = unpermuted(tiles)
    rows = found[: len(x), :width].contiguous().view(codes)
    assert torch.equal(rows.cpu().float(), wanted.float())
    assert not found[: len(x), width:].any() and bool((found[len(x) :] == 77).all())
    assert torch.equal(scales.cpu().nan_to_num(-1), wanted_scales[:, 0].nan_to_num(-1))
