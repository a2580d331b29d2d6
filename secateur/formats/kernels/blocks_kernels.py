"""The Triton kernels of `blocks.py`, in a module of their own because importing it needs Triton.

One kernel is the product of a weight in blocks with tokens, by the weight or by its transpose, and
one the products of outputs' gradients with inputs at the kept blocks alone. Sums are float32.
"""

from typing import no_type_check

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor as TensorDescriptor

NUMBERS = ("tokens", "row_tiles")  # or 1 and multiples of 16 would be compiled anew


@triton.jit
@no_type_check
def _place(tokens, row_tiles, tile_tokens: tl.constexpr, group: tl.constexpr):
    """The tile of tokens and the tile of rows of this program.

    Programs run about in the order of their numbers. Those that follow one another share the rows
    of the weight among `group` tiles of tokens, whose inputs stay in the cache for all rows.
    """
    program = tl.program_id(0)
    token_tiles = tl.cdiv(tokens, tile_tokens)
    first = program // (group * row_tiles) * group
    size = tl.minimum(token_tiles - first, group)
    inside = program % (group * row_tiles)
    return first + inside % size, inside // size


@triton.jit
@no_type_check
def _blocks_at(
    columns,
    places,
    member,
    entry,
    end,
    joined: tl.constexpr,
):
    """The column of blocks of an entry, and which stored block it is for each row; none is -1.

    Both are one number, or `entry` and so they are one for each of some columns.
    """
    column = tl.load(columns + entry, mask=entry < end, other=0)
    if joined > 1:
        place = tl.load(places + entry * joined + member, mask=entry < end, other=-1)
    else:
        place = tl.load(places + entry, mask=entry < end, other=0)
    return column, place


@triton.jit(do_not_specialize=NUMBERS)
@no_type_check
def multiply_blocks(
    x,
    values,
    starts,
    columns,
    places,
    members,
    bias,
    result,
    tokens,
    width,
    out,
    row_tiles,
    rows: tl.constexpr,
    cols: tl.constexpr,
    joined: tl.constexpr,
    is_transposed: tl.constexpr,
    has_bias: tl.constexpr,
    splits: tl.constexpr,
    tokens_first: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_tokens: tl.constexpr,
    tile_k: tl.constexpr,
    group: tl.constexpr,
):
    """`result[tokens, out] = x[tokens, width] @ W.T + bias`, W in blocks of `rows` x `cols`.

    `joined` rows of blocks, `members` of a line, share the inputs that are read for any of them:
    line `i` has the entries `starts[i]..starts[i + 1]`, at `columns` of blocks, and `places` says
    for each member which of `values` it has there, -1 for none, which counts as zeros and is not
    read. Where the weight is transposed blocks are `values[place].T`.

    The columns of a line are one axis, `tile_k` of it at a time: a part of an entry, or of a line
    of one member several entries. With `splits` that axis is cut among as many programs, each
    writing its sums to a part of its own, `result[split, tokens, out]`.
    """
    token_tile, row_tile = _place(tokens, row_tiles, tile_tokens, group)
    tiles_a_line: tl.constexpr = joined * rows // tile_rows
    line = row_tile // tiles_a_line
    begin = tl.load(starts + line)
    end = tl.load(starts + line + 1)
    split = tl.program_id(1)
    if splits > 1:
        share = tl.cdiv(end - begin, splits)
        begin = tl.minimum(begin + split * share, end)
        end = tl.minimum(begin + share, end)

    token = token_tile * tile_tokens + tl.arange(0, tile_tokens)
    inputs = x + tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * width
    row = row_tile % tiles_a_line * tile_rows + tl.arange(0, tile_rows)
    member, row_in_block = row // rows, row % rows
    k = tl.arange(0, tile_k)
    if cols % tile_k == 0:
        ahead = 0
    else:
        ahead = k
    if tokens_first:
        sums = tl.zeros([tile_tokens, tile_rows], dtype=tl.float32)
    else:
        sums = tl.zeros([tile_rows, tile_tokens], dtype=tl.float32)
    # Indices are read one step ahead: a load whose address waits for another is not pipelined.
    column, place = _blocks_at(columns, places, member, begin + ahead // cols, end, joined)
    for at in range(0, (end - begin) * cols, tile_k):
        inner = (at + k) % cols
        read = (column * cols + inner)[None, :]
        if joined > 1:
            first = (place * (rows * cols))[:, None]
        elif cols % tile_k == 0:
            first = place * (rows * cols)
        else:
            first = (place * (rows * cols))[None, :]
        if is_transposed:
            weights = values + (first + (inner * rows)[None, :] + row_in_block[:, None])
        else:
            weights = values + (first + inner[None, :] + row_in_block[:, None] * cols)
        if cols % tile_k == 0:
            used = tl.load(inputs + read)
        else:
            inside = (at + k < (end - begin) * cols)[None, :]
            used = tl.load(inputs + read, mask=inside, other=0.0)
        if joined > 1:
            block = tl.load(weights, mask=(place >= 0)[:, None], other=0.0)
        elif cols % tile_k == 0:
            block = tl.load(weights)
        else:
            block = tl.load(weights, mask=inside, other=0.0)
        entry = begin + (at + tile_k + ahead) // cols
        column, place = _blocks_at(columns, places, member, entry, end, joined)
        if tokens_first:
            sums = tl.dot(used, tl.trans(block), sums)
        else:
            sums = tl.dot(block, tl.trans(used), sums)

    if not tokens_first:
        sums = tl.trans(sums)
    column = tl.load(members + line * joined + member) * rows + row_in_block
    if has_bias:
        sums += tl.load(bias + column).to(tl.float32)[None, :]
    target = result + (split.to(tl.int64) * tokens + token)[:, None] * out + column[None, :]
    tl.store(target, sums.to(result.dtype.element_ty), mask=(token < tokens)[:, None])


@triton.jit
@no_type_check
def _store_rows(
    sums, row, bias, result, token, tokens, out, rows: tl.constexpr, has_bias: tl.constexpr
):
    """The results of the tokens for a row of blocks."""
    column = row * rows + tl.arange(0, rows)
    if has_bias:
        sums += tl.load(bias + column).to(tl.float32)[None, :]
    target = result + token.to(tl.int64)[:, None] * out + column[None, :]
    tl.store(target, sums.to(result.dtype.element_ty), mask=(token < tokens)[:, None])


@triton.jit(do_not_specialize=NUMBERS)
@no_type_check
def multiply_boxes(
    x,
    values,
    starts,
    columns,
    places,
    members,
    bias,
    result,
    tokens,
    out,
    row_tiles,
    rows: tl.constexpr,
    cols: tl.constexpr,
    joined: tl.constexpr,
    has_bias: tl.constexpr,
    tokens_first: tl.constexpr,
    tile_tokens: tl.constexpr,
    group: tl.constexpr,
):
    """What `multiply_blocks` is for lines of one or two members, by Hopper's engine for boxes.

    `x` and `values` are descriptors, of boxes of `tile_tokens` x `cols` and of blocks. What lies
    beyond a matrix is zeros and is not read: tokens behind the last, and block -1.
    """
    token_tile, line = _place(tokens, row_tiles, tile_tokens, group)
    begin = tl.load(starts + line)
    end = tl.load(starts + line + 1)
    if tokens_first:
        sums = tl.zeros([tile_tokens, rows], dtype=tl.float32)
    else:
        sums = tl.zeros([rows, tile_tokens], dtype=tl.float32)
    others = sums
    column = tl.load(columns + begin, mask=begin < end, other=0)
    place = tl.load(places + joined * begin, mask=begin < end, other=0)
    other_place = place
    if joined > 1:
        other_place = tl.load(places + joined * begin + 1, mask=begin < end, other=0)
    for entry in range(begin, end):
        used = x.load([token_tile * tile_tokens, column * cols])
        block = values.load([place * rows, 0])
        if tokens_first:
            sums = tl.dot(used, tl.trans(block), sums)
        else:
            sums = tl.dot(block, tl.trans(used), sums)
        if joined > 1:
            block = values.load([other_place * rows, 0])
            if tokens_first:
                others = tl.dot(used, tl.trans(block), others)
            else:
                others = tl.dot(block, tl.trans(used), others)
        more = entry + 1 < end
        column = tl.load(columns + entry + 1, mask=more, other=0)
        place = tl.load(places + joined * (entry + 1), mask=more, other=0)
        if joined > 1:
            other_place = tl.load(places + joined * (entry + 1) + 1, mask=more, other=0)

    token = token_tile * tile_tokens + tl.arange(0, tile_tokens)
    if not tokens_first:
        sums = tl.trans(sums)
    row = tl.load(members + joined * line)
    _store_rows(sums, row, bias, result, token, tokens, out, rows, has_bias)
    if joined > 1:
        if not tokens_first:
            others = tl.trans(others)
        row = tl.load(members + joined * line + 1)
        _store_rows(others, row, bias, result, token, tokens, out, rows, has_bias)


@triton.jit(do_not_specialize=["size"])
@no_type_check
def add_parts(
    parts,
    bias,
    result,
    size,
    out,
    has_bias: tl.constexpr,
    splits: tl.constexpr,
    tile: tl.constexpr,
):
    """`result = parts.sum(0) + bias`, added in the order of the parts and rounded once."""
    at = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = at < size
    sums = tl.zeros([tile], dtype=tl.float32)
    for split in tl.static_range(splits):
        sums += tl.load(parts + split * size.to(tl.int64) + at, mask=inside, other=0.0)
    if has_bias:
        sums += tl.load(bias + at % out, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + at, sums.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
@no_type_check
def sample_products(
    grads,
    x,
    starts,
    columns,
    result,
    tokens,
    out,
    width,
    row_tiles,
    rows: tl.constexpr,
    cols: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_cols: tl.constexpr,
    tile_tokens: tl.constexpr,
    spans: tl.constexpr,
):
    """`result[e] = grads[:, rows of e].T @ x[:, columns of e]` for every kept block `e`.

    A program has `tile_cols` of the kept columns of a row of blocks: a part of a block, or several
    blocks beside one another, which share the outputs' gradients. `spans` programs share a row and
    each takes the next such tile in turn.
    """
    row_tile = tl.program_id(0) // spans
    span = tl.program_id(0) % spans
    tiles_a_block: tl.constexpr = rows // tile_rows
    row = row_tile // tiles_a_block
    row_in_block = row_tile % tiles_a_block * tile_rows + tl.arange(0, tile_rows)
    begin = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    for at in range(span * tile_cols, (end - begin) * cols, spans * tile_cols):
        entry = begin + (at + tl.arange(0, tile_cols)) // cols
        inner = (at + tl.arange(0, tile_cols)) % cols
        kept = entry < end
        column = tl.load(columns + entry, mask=kept, other=0) * cols + inner
        sums = tl.zeros([tile_rows, tile_cols], dtype=tl.float32)
        for first in range(0, tokens, tile_tokens):
            token = first + tl.arange(0, tile_tokens)
            is_token = (token < tokens)[:, None]
            token = token.to(tl.int64)[:, None]
            grad = tl.load(
                grads + token * out + (row * rows + row_in_block)[None, :], mask=is_token, other=0.0
            )
            used = tl.load(x + token * width + column[None, :], mask=is_token, other=0.0)
            sums = tl.dot(tl.trans(grad), used, sums)
        target = result + (entry * (rows * cols) + inner)[None, :] + row_in_block[:, None] * cols
        tl.store(target, sums.to(result.dtype.element_ty), mask=kept[None, :])
