"""A packed 2:4 weight of 8-bit codes as the prefill kernel reads it.

Tiles of 128 rows x 128 columns, each one run of bytes; the layout is drawn at the head of
`kernel.cu`. Rows and columns are filled up to whole tiles with zeros.
"""

from math import ceil

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

ROWS, COLUMNS = 128, 128
TILE_BYTES = ROWS * COLUMNS // 2 + ROWS * COLUMNS // 8
TWO_FIRST = 0b0100_0100  # the places of zeros: two groups that keep their first two columns


def arrange(
    codes: Shaped[Tensor, "out half_in"], metadata: UInt8[Tensor, "out bytes"]
) -> UInt8[Tensor, "tiles blocks tile_bytes"]:
    """The tiles of a weight whose kept codes, 8 bits each, are `codes`.

    Cost: the arranged bytes, 0.625 a weight, and once more while it runs.
    """
    rows, columns = -codes.shape[0] % ROWS, -codes.shape[1] % (COLUMNS // 2)
    kept = torch.nn.functional.pad(codes.view(torch.uint8), (0, columns, 0, rows))
    missing = kept.shape[1] // 4 - metadata.shape[1]
    places = torch.nn.functional.pad(metadata, (0, missing, 0, rows), value=TWO_FIRST)
    # rows as [tile, warpgroup, warp, half h, g], kept columns as [block, step, b, t, e]
    values = kept.view(-1, 2, 4, 2, 8, kept.shape[1] // 64, 2, 2, 4, 4)
    values = values.permute(0, 5, 1, 6, 2, 4, 8, 7, 3, 9).flatten(2)
    # words of 32 columns as [block, step, half]
    words = places.view(torch.int32).view(-1, 2, 4, 2, 8, kept.shape[1] // 64, 2, 2)
    words = words.permute(0, 5, 1, 2, 4, 7, 3, 6).flatten(2)
    return torch.cat((values, words.contiguous().view(torch.uint8)), dim=2)


def restore(
    tiles: UInt8[Tensor, "tiles blocks tile_bytes"],
    shape: tuple[int, int],
    code_dtype: torch.dtype,
) -> tuple[Shaped[Tensor, "out half_in"], UInt8[Tensor, "out bytes"]]:
    """The codes and metadata of an [out, in] weight that `arrange` was given, bit for bit.

    Cost: the restored bytes, and once more while it runs.
    """
    values, words = tiles.split((ROWS * COLUMNS // 2, ROWS * COLUMNS // 8), dim=2)
    rows = len(tiles) * ROWS
    # the dimensions of `arrange`, each put back to its place
    kept = values.unflatten(2, (2, 2, 4, 8, 4, 2, 2, 4)).permute(0, 2, 4, 8, 5, 1, 3, 7, 6, 9)
    codes = kept.reshape(rows, -1)[: shape[0], : shape[1] // 2]
    places = words.view(torch.int32).unflatten(2, (2, 4, 8, 2, 2, 2))
    metadata = places.permute(0, 2, 3, 6, 4, 1, 7, 5).reshape(rows, -1).view(torch.uint8)
    metadata = metadata[: shape[0], : ceil(shape[1] / 8)]
    return codes.contiguous().view(code_dtype), metadata.contiguous()
