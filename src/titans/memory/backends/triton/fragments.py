"""Tiles of hidden units as products of warp groups hold them, with no shared memory on their way.

In the forward kernel's products the weights are the left operand, whose rows are hidden units, and the
tokens the right one. A warp has 16 rows. A thread has two of them, r and r + 8, and of eight columns two
neighbours of a result, or columns c and c + 4 of a left operand in tf32. Triton loads a tile in the order
that suits memory and then rearranges it through shared memory, between two barriers. The offsets here have
an axis for each part of a row and of a column, in the order in which Triton deals out registers, lanes and
warps, so that each thread loads what the product wants of it. What remains is to rename axes, which costs
nothing.

Two orders are free. Rows r and r + 8 are neighbouring hidden units (`_in_order` is their order in memory),
and a sum over columns takes those of a result as they are (`_left`, `_right`).

The results are right for tiles of any size. The layouts agree where a tile has 16 rows for each warp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans.memory.backends.triton.elementary import _dot


@triton.jit
def _axis(SIZE: tl.constexpr, AT: tl.constexpr):
    """0, 1, … along one of seven axes."""
    x = tl.arange(0, SIZE)
    for i in tl.static_range(7):
        if i != AT:
            x = tl.expand_dims(x, i)
    return x


@triton.jit
def _by_rows(ROWS: tl.constexpr, COLUMNS: tl.constexpr, width):
    """Offsets of a tile of a matrix with `width` numbers in a row.

    Axes: 128 rows, half, eight columns, warp, row, pair of columns, column of the pair.
    """
    TIMES: tl.constexpr = (ROWS + 127) // 128
    row = _axis(TIMES, 0) * 128 + _axis(2, 1) + _axis(ROWS // TIMES // 16, 3) * 16 + _axis(8, 4) * 2
    return row * width + _axis(COLUMNS // 8, 2) * 8 + _axis(4, 5) * 2 + _axis(2, 6)


@triton.jit
def _by_columns(ROWS: tl.constexpr, COLUMNS: tl.constexpr, width):
    """Offsets of a tile that lies in memory as (columns, rows), with `width` numbers in a column.

    Axes: 128 rows, eight columns, column of the pair, warp, row, pair of columns, half.
    """
    TIMES: tl.constexpr = (ROWS + 127) // 128
    row = _axis(TIMES, 0) * 128 + _axis(2, 6) + _axis(ROWS // TIMES // 16, 3) * 16 + _axis(8, 4) * 2
    return row + (_axis(COLUMNS // 8, 1) * 8 + _axis(4, 5) * 2 + _axis(2, 2)) * width


@triton.jit
def _from_rows(x):
    """(rows, columns) of what was loaded from `_by_rows`."""
    ROWS: tl.constexpr = x.shape[0] * x.shape[3] * 16
    return tl.reshape(tl.permute(x, (0, 3, 1, 4, 2, 5, 6)), (ROWS, x.shape[2] * 8))


@triton.jit
def _from_columns(x):
    """(rows, columns) of what was loaded from `_by_columns`."""
    ROWS: tl.constexpr = x.shape[0] * x.shape[3] * 16
    return tl.reshape(tl.permute(x, (0, 3, 6, 4, 1, 5, 2)), (ROWS, x.shape[1] * 8))


@triton.jit
def _apart(x):
    """Axes: 128 rows, warp, half, row, eight columns, pair of columns, column of the pair."""
    TIMES: tl.constexpr = (x.shape[0] + 127) // 128
    return tl.reshape(x, (TIMES, x.shape[0] // TIMES // 16, 2, 8, x.shape[1] // 8, 4, 2))


@triton.jit
def _to_rows(x):
    """(rows, columns) as what is stored to `_by_rows`."""
    return tl.permute(_apart(x), (0, 2, 4, 1, 3, 5, 6))


@triton.jit
def _to_columns(x):
    """(rows, columns) as what is stored to `_by_columns`."""
    return tl.permute(_apart(x), (0, 4, 6, 1, 3, 5, 2))


@triton.jit
def _in_order(x):
    """Rows as they lie in memory."""
    halves = tl.reshape(x, (x.shape[0] // 16, 2, 8, x.shape[1]))
    return tl.reshape(tl.permute(halves, (0, 2, 1, 3)), x.shape)


@triton.jit
def _halves_added(x):
    """Sums over the rows that a thread has, (warps, 8, columns): the rest is added up once for all tiles."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 16, 2, 8, x.shape[1])), 1)


@triton.jit
def _left(x, PRECISION: tl.constexpr):
    """A result, or a tile from memory, as a left operand, whose columns it takes in another order."""
    if PRECISION == "bf16":
        return x
    else:
        parts = tl.reshape(x, (x.shape[0], x.shape[1] // 8, 4, 2))
        return tl.reshape(tl.permute(parts, (0, 1, 3, 2)), x.shape)


@triton.jit
def _right(x, PRECISION: tl.constexpr):
    """Rows in the order of the columns of `_left`."""
    if PRECISION == "bf16":
        return x
    else:
        parts = tl.reshape(x, (x.shape[0] // 8, 4, 2, x.shape[1]))
        return tl.reshape(tl.permute(parts, (0, 2, 1, 3)), x.shape)


@triton.jit
def _times(a, b, PRECISION: tl.constexpr):
    """a b, where a is in registers as a result is."""
    return _dot(_left(a, PRECISION), _right(b, PRECISION), PRECISION)


@triton.jit
def _overlaps(a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """aᵀ b of two tiles with the same rows, which are to be summed: (PARTS, columns, columns).

    A square product of a few tokens is no task for a warp group, so that each warp has a part of the rows.
    """
    COLUMNS: tl.constexpr = a.shape[1]
    if COLUMNS >= 64:
        return _dot(tl.trans(a), b, PRECISION)[None, :, :]
    else:
        ROWS: tl.constexpr = a.shape[0]
        turned = tl.permute(tl.reshape(a, (PARTS, ROWS // PARTS, COLUMNS)), (0, 2, 1))
        return _dot(turned, tl.reshape(b, (PARTS, ROWS // PARTS, COLUMNS)), PRECISION)


@triton.jit
def _written(
    w, s, d, h, layer, end_weights, end_momentum, end_steps, momentum_momentum, momentum_steps,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of weights and its momentum after a chunk, to which d h is added.

    d: (its rows, CHUNK). h: (CHUNK, its columns), which both products share: a step's coefficients go to d,
    which is in registers, so that no second h takes room next to the first.
    """
    step = layer * h.shape[0] + tl.arange(0, h.shape[0])
    # In this order: where all is forgotten, nothing is left to round.
    w += w * tl.load(end_weights + layer) + s * tl.load(end_momentum + layer)
    w += _times(d * tl.load(end_steps + step)[None, :], h, PRECISION)
    s = s * tl.load(momentum_momentum + layer)
    return w, s + _times(d * tl.load(momentum_steps + step)[None, :], h, PRECISION)
