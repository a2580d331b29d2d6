"""The arranged bytes, read as the kernel's lanes read them, are the weight again."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from secateur.formats import four_of_eight
from secateur.formats.kernels.decode24.arrange import (
    FORMATS,
    ROWS_AT_ONCE,
    UNIT_COLUMNS,
    UNIT_ROWS,
    Kind,
    Structure,
    arrange,
    restore,
    unit_bytes,
    value_bytes,
)
from secateur.formats.semi24 import Semi24
from secateur.formats.semi48 import Semi48
from tests.formats.weights import fitting_weight, random_metadata

# What a 16-bit float read from a register has to be multiplied by: see `expand_word` in units.cuh.
RESTORE = {
    (Kind.W16, torch.bfloat16): 1.0,
    (Kind.W16, torch.float16): 1.0,
    (Kind.INT8, torch.bfloat16): 2.0**133,
    (Kind.INT8, torch.float16): 2.0**24,
    (Kind.INT4, torch.bfloat16): 2.0**133,
    (Kind.INT4, torch.float16): 2.0**24,
    (Kind.FP8, torch.bfloat16): 2.0**120,
    (Kind.FP8, torch.float16): 2.0**8,
}
MASK = 0xFFFFFFFF


def rotl(word: int, by: int) -> int:
    return (word << by | word >> (32 - by)) & MASK if by else word


def permute(a: int, b: int, selector: int) -> int:
    """PRMT: bytes of b:a by the selector's nibbles; from 8 on, the sign of the byte named."""
    given, word = (b << 32 | a).to_bytes(8, "little"), 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = given[nibble & 7]
        word |= (0xFF * (byte >> 7) if nibble >> 3 else byte) << 8 * i
    return word


def selectors(kind: Kind, metadata: int, j: int) -> int:
    """As of_eight.cuh makes them."""
    number = 0x11 if kind is Kind.INT4_48 else 0x22
    before = number * (-0x01010100 if j % 2 else 0x01010100)
    none, first = 0x88, 0x40 if kind is Kind.INT4_48 else 0x10
    factor = (before + first - none) // 8 * (8 >> j)
    base = (none + 3 * number * (j % 2)) * 0x01010101
    return (metadata & 0x01010101 << j) * factor + base & MASK


def columns_of_eight(
    kind: Kind, unit: bytes, lane: int, step: int, row: int, dtype: torch.dtype
) -> list[float]:
    """The eight columns of row g + 8 row that a lane expands, as `expand_of_eight` does."""
    words = np.frombuffer(unit, dtype="<u4")
    if kind is Kind.INT4_48:
        word = rotl(int(words[4 * lane + step]), 32 - 4 * row)
        low, high = word & 0x07070707, word & 0x80808080
    else:
        low, high = (int(words[128 * step + 4 * lane + row + 2 * i]) for i in range(2))
    meta = int(words[value_bytes(kind) // 4 + 2 * lane + step // 2]) >> 4 * (step % 2)
    found = []
    for half in range(2):
        which = selectors(kind, meta, 2 * row + half)
        for selector, signs in ((which & 0xFFFF, 0x9988), (which >> 16, 0xBBAA)):
            word = permute(low, high, selector)
            if kind is Kind.W16_48:
                word &= ~permute(which, which, signs)
            found += floats(word & MASK, dtype)
    return found


def read_back_of_eight(units: Tensor, kind: Kind, dtype: torch.dtype) -> Tensor:
    """The dense codes: every lane's registers, as they are multiplied."""
    tiles, count, _ = units.shape
    dense = torch.zeros(tiles * 16, count * 128, dtype=torch.float64)
    for tile, unit, lane in product(range(tiles), range(count), range(32)):
        data = units[tile, unit].numpy().tobytes()
        for step, row in product(range(4), range(2)):
            first = 128 * unit + 32 * step + 8 * (lane % 4)
            numbers = columns_of_eight(kind, data, lane, step, row, dtype)
            at = 16 * tile + lane // 4 + 8 * row, slice(first, first + 8)
            dense[at] = torch.tensor(numbers, dtype=torch.float64) * RESTORE[kind.numbers, dtype]
    return dense


def registers(kind: Kind, dtype: torch.dtype, unit: bytes, lane: int) -> list[list[int]]:
    """The A registers of a unit's multiplications, as `expand` makes them."""
    words = np.frombuffer(unit, dtype="<u4")
    loads = [words[128 * i + 4 * lane :][:4] for i in range(value_bytes(kind) // 512)]
    loaded = [int(word) for load in loads for word in load]
    if kind.numbers is Kind.W16:
        return [loaded[4 * s : 4 * s + 4] for s in range(4)]
    if kind.numbers is Kind.INT4:
        return [[rotl(word, 4 * i) & 0x80078007 for i in range(4)] for word in loaded]
    steps = []
    for s in range(len(loaded) // 2):
        made = []
        for w in loaded[2 * s : 2 * s + 2]:
            if kind.numbers is Kind.INT8:
                made += [w & 0x807F807F, rotl(w, 8) & 0x807F807F]
            elif dtype == torch.float16:
                made += [w & 0xBF80BF80, (w << 7 & 0x3F803F80) | (w << 1 & 0x80008000)]
            else:
                made += [w & 0x87F087F0, (w << 4 & 0x80F080F0) | (w >> 4 & 0x07000700)]
        steps.append(made)
    return steps


def floats(word: int, dtype: torch.dtype) -> list[float]:
    halves = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16)
    return halves.view(dtype).double().tolist()


def read_back(units: Tensor, kind: Kind, dtype: torch.dtype) -> Tensor:
    """The dense codes: every lane's registers placed by its metadata."""
    tiles, count, _ = units.shape
    dense = torch.zeros(tiles * 16, count * 128, dtype=torch.float64)
    values = unit_bytes(kind, False) - 256
    for tile in range(tiles):
        for unit in range(count):
            data = units[tile, unit].numpy().tobytes()
            meta = np.frombuffer(data[values : values + 256], dtype="<u4")
            for lane in range(32):
                g, t = lane // 4, lane % 4
                for s, made in enumerate(registers(kind, dtype, data, lane)):
                    for i, word in enumerate(made):
                        row = g + 8 * (i % 2)
                        for e, value in enumerate(floats(word, dtype)):
                            kept = 2 * t + e + 8 * (i // 2)  # of this step's 16
                            # the quad's lane that holds these columns' nibbles
                            holder = 4 * g + 2 * (s % 2) + kept // 8
                            half = int(meta[2 * holder + s // 2]) >> (16 * (i % 2)) & 0xFFFF
                            nibble = half >> (4 * (kept % 8 // 2)) & 15
                            place = nibble >> (2 * (kept % 2)) & 3
                            column = 128 * unit + 32 * s + 4 * (kept // 2) + place
                            dense[16 * tile + row, column] += value * RESTORE[kind, dtype]
    return dense


def read_back_of_all(units: Tensor, kind: Kind, dtype: torch.dtype) -> Tensor:
    """The dense codes: register i of a lane's mma 2s + j has columns 32s + 8t + 4j + 2(i / 2)."""
    tiles, count, _ = units.shape
    dense = torch.zeros(tiles * 16, count * 128, dtype=torch.float64)
    for tile, unit, lane in product(range(tiles), range(count), range(32)):
        data = units[tile, unit].numpy().tobytes()
        for number, made in enumerate(registers(kind, dtype, data, lane)):
            first = 128 * unit + 16 * (number - number % 2) + 8 * (lane % 4) + 4 * (number % 2)
            for i, word in enumerate(made):
                at = first + 2 * (i // 2)
                pair = torch.tensor(floats(word, dtype), dtype=torch.float64)
                row = 16 * tile + lane // 4 + 8 * (i % 2)
                dense[row, at : at + 2] = pair * RESTORE[kind.numbers, dtype]
    return dense


LANES = {
    Structure.TWO_OF_FOUR: read_back,
    Structure.FOUR_OF_EIGHT: read_back_of_eight,
    Structure.ALL: read_back_of_all,
}


def codes_of(kind: Kind, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random codes where values are not zero: as stored, and as numbers."""
    generator = torch.Generator().manual_seed(3)
    if kind.numbers is Kind.W16:
        return values, values.double()
    if kind is Kind.FP8:
        bits = torch.randint(256, values.shape, generator=generator).to(torch.uint8)
        bits[bits & 0x7F == 0x7F] = 0  # not a number
        numbers = bits.view(torch.float8_e4m3fn).double()
        return bits, numbers
    most = 7 if kind.numbers is Kind.INT4 else 127
    codes = torch.randint(-most, most + 1, values.shape, generator=generator).to(torch.int8)
    return codes, codes.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [kind for kind in Kind if not kind.on_dense_cores])
@pytest.mark.parametrize("columns", [256, 192])
def test_lanes_read_the_weight(kind: Kind, dtype: torch.dtype, columns: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(32, columns, generator=generator)
    order = torch.rand(32, columns // 4, 4, generator=generator).argsort(-1)
    packed = Semi24().pack((weight * (order < 2).flatten(1)).to(dtype))
    codes, numbers = codes_of(kind, packed["values"], dtype)
    expected = torch.zeros(32, columns // 4, 4, dtype=torch.float64)
    nibbles = torch.stack((packed["metadata"] & 15, packed["metadata"] >> 4), 2).flatten(1)
    places = torch.stack((nibbles & 3, nibbles >> 2), 2).long()
    expected.scatter_(2, places, numbers.unflatten(1, (-1, 2)))

    units = arrange(kind, codes, packed["metadata"], None, dtype)
    assert units.shape == (2, 2, unit_bytes(kind, False))
    dense = read_back(units, kind, dtype)
    assert torch.equal(dense[:, :columns], expected.flatten(1))
    assert not dense[:, columns:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Kind.W16_48, Kind.INT4_48])
@pytest.mark.parametrize("columns", [256, 192])
def test_lanes_read_a_weight_of_four_of_eight(kind: Kind, dtype: torch.dtype, columns: int) -> None:
    metadata = random_metadata(32, columns, 1, Structure.FOUR_OF_EIGHT)
    assert metadata is not None and len(metadata.unique()) == 70
    values = torch.randn(32, columns // 2, generator=torch.Generator().manual_seed(2)).to(dtype)
    codes, numbers = codes_of(kind, values, dtype)
    units = arrange(kind, codes, metadata, None, dtype)
    assert units.shape == (2, 2, unit_bytes(kind, False)) == (2, 2, unit_bytes(kind.numbers, False))
    dense = read_back_of_eight(units, kind, dtype)
    assert torch.equal(dense[:, :columns], four_of_eight.scatter(numbers, metadata))
    assert not dense[:, columns:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "size"), [(Kind.INT8_ALL, 2048), (Kind.INT4_ALL, 1024)])
@pytest.mark.parametrize("columns", [256, 192])
def test_lanes_read_a_weight_without_zeros(
    kind: Kind, size: int, dtype: torch.dtype, columns: int
) -> None:
    codes, numbers = codes_of(kind, torch.empty(32, columns), dtype)
    units = arrange(kind, codes, None, None, dtype)
    assert units.shape == (2, 2, size) and unit_bytes(kind, True) == size + 32
    dense = read_back_of_all(units, kind, dtype)
    assert torch.equal(dense[:, :columns], numbers)
    assert not dense[:, columns:].any()


def test_a_packed_weight_of_four_of_eight_is_what_lanes_read() -> None:
    weight = fitting_weight("semi48", 16, 128, torch.bfloat16)
    packed = Semi48().pack(weight)
    units = arrange(Kind.W16_48, packed["values"], packed["metadata"], None, torch.bfloat16)
    dense = read_back_of_eight(units, Kind.W16_48, torch.bfloat16)
    assert torch.equal(dense, weight.double())


@pytest.mark.parametrize(("kind", "size"), [(Kind.INT4, 800), (Kind.INT4_ALL, 1056)])
def test_scales_of_two_rows_lie_in_one_word(kind: Kind, size: int) -> None:
    scales = torch.arange(1, 33).reshape(16, 2).to(torch.bfloat16)
    codes = torch.zeros(16, round(256 * kind.kept), dtype=torch.int8)
    metadata = random_metadata(16, 256, 0, kind.structure)
    units = arrange(kind, codes, metadata, scales, torch.bfloat16)
    assert units.shape == (1, 2, size)
    for unit in range(2):
        read = units[0, unit, -32:].view(torch.bfloat16).reshape(8, 2)
        assert torch.equal(read[:, 0], scales[:8, unit])
        assert torch.equal(read[:, 1], scales[8:, unit])


LARGEST = {Kind.INT8: 127, Kind.INT4: 7}
DTYPES = (torch.bfloat16, torch.float16)


def any_codes(kind: Kind, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Of every pattern of bits that a code of this kind may have, -0 and infinite ones too."""
    generator = torch.Generator().manual_seed(seed)
    if kind.numbers is Kind.W16:
        bits = torch.randint(-(2**15), 2**15, shape, generator=generator)
        return bits.to(torch.int16).view(dtype)
    if kind is Kind.FP8:
        return torch.randint(256, shape, generator=generator).to(torch.uint8)
    most = LARGEST[kind.numbers]
    return torch.randint(-most, most + 1, shape, generator=generator).to(torch.int8)


def held_to_the_weight(
    format: str, dtype: torch.dtype, shape: tuple[int, int], seed: int, device: str
) -> None:
    kind, grouped = FORMATS[format]
    rows, columns = shape
    codes = any_codes(kind, (rows, round(columns * kind.kept)), dtype, seed).to(device)
    metadata = random_metadata(rows, columns, seed, kind.structure)
    metadata = None if metadata is None else metadata.to(device)
    scales = None
    if grouped:
        scales = any_codes(Kind.W16, (rows, -(-columns // UNIT_COLUMNS)), dtype, seed).to(device)
    units = arrange(kind, codes, metadata, scales, dtype)
    found = restore(kind, units, grouped, columns, dtype)
    for wanted, tensor in zip((codes, metadata, scales), found, strict=True):
        if wanted is None:
            assert tensor is None
            continue
        assert tensor is not None and tensor.dtype == wanted.dtype and tensor.is_contiguous()
        assert torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8))


@given(
    format=st.sampled_from(list(FORMATS)),
    dtype=st.sampled_from(DTYPES),
    tiles=st.integers(1, 4),
    groups=st.integers(1, 100),  # of four columns, or of eight
    seed=st.integers(0, 2**16),
)
@example("semi24_int4", torch.bfloat16, ROWS_AT_ONCE // UNIT_ROWS + 1, 16, 0)
def test_what_was_arranged_is_restored(
    format: str, dtype: torch.dtype, tiles: int, groups: int, seed: int
) -> None:
    """Bit for bit, whatever the width: the metadata's last byte may be half a byte."""
    width = 8 if FORMATS[format][0].structure is Structure.FOUR_OF_EIGHT else 4
    held_to_the_weight(format, dtype, (UNIT_ROWS * tiles, width * groups), seed, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_what_was_arranged_is_restored_on_a_gpu(format: str, dtype: torch.dtype) -> None:
    held_to_the_weight(format, dtype, (ROWS_AT_ONCE + 528, 1984), 0, "cuda")
