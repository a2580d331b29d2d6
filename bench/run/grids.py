"""What rounding to each grid costs a weight, with plain and with searched scales.

    python -m bench.run.grids

A row is ||W - W'|| / ||W|| of one grid on random weights pruned to 2:4 by magnitude, in bfloat16:
normal ones, and Student's t with five degrees of freedom for heavy tails.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench.lib.command import parser_of
from bench.lib.rows import Row, append
from secateur import NM, Fp8, Int4, Int8
from secateur.patterns.grids import Grid

SHAPE = (512, 4096)
LARGEST = {"Int4()": 7.0, "Int4(None)": 7.0, "Int8()": 127.0, "Fp8()": 448.0}
GRIDS: dict[str, Grid] = {
    "Int4()": Int4(),
    "Int4(None)": Int4(None),
    "Int8()": Int8(),
    "Fp8()": Fp8(),
}


def weights() -> dict[str, Tensor]:
    """The two weights, from a fixed seed; t(5) is a normal over the root of five mean squares."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(SHAPE, generator=generator)
    squares = torch.randn(5, *SHAPE, generator=generator).square().mean(0)
    heavy = torch.randn(SHAPE, generator=generator) / squares.sqrt()
    pruned = {"normal": normal, "t(5)": heavy}
    return {n: (w * NM(2, 4).mask(w.abs())).to(torch.bfloat16) for n, w in pruned.items()}


def plain_scales(weight: Tensor, grid: Grid, largest: float) -> Tensor:
    """The largest magnitude of each group becomes the largest code."""
    groups = weight.unflatten(1, (-1, grid.group_size or weight.shape[1]))
    return (groups.float().abs().amax(-1) / largest).to(weight.dtype)


def error(weight: Tensor, grid: Grid, scales: Tensor) -> float:
    """Of the rounded weight, relative, by norm."""
    rounded = grid.dequantised(grid.codes(weight, scales), scales).double()
    return float((rounded - weight.double()).norm() / weight.double().norm())


def rows() -> Iterator[Row]:
    for name, weight in weights().items():
        for text, grid in GRIDS.items():
            plain = plain_scales(weight, grid, LARGEST[text])
            for way, scales in (("largest", plain), ("searched", grid.scales(weight))):
                found = error(weight, grid, scales)
                yield {"weights": name, "grid": text, "scales": way, "error": f"{found:.5f}"}


def main(words: Sequence[str] | None = None) -> None:
    parser = parser_of("grids", __doc__)
    arguments = parser.parse_args(words)
    print(append(arguments.output, "grids", list(rows()), "cpu"))


if __name__ == "__main__":
    main()
