"""The kernel of the scan, forward: one program for each head of each row, chunk after chunk.

The algorithm is that of `chunkwise/chunk.py`; read it there. A memory of two layers is W_up, (HIDDEN, DIM),
and W_down, (DIM, HIDDEN); a linear memory is a W_down alone, whose hidden units are its inputs, so that
HIDDEN is the width of keys and queries. The kernel passes over the hidden units BLOCK at a time, rows of W_up
and columns of W_down, so that a wider memory takes longer and no more registers. Where the data is and what
bounds the time: the lab notebook on these kernels.

Sizes: CHUNK tokens; values and reads have DIM numbers; a memory matrix has `size` numbers, and `num_rows` of
them lie together. EPS, FLOOR, RADIUS: the norm's, the squared `length_floor`, the `row_limit`. ACTIVATION:
see `elementary.py`. OBJECTIVE, PARAMETER: see `objective.py`. MARKED: rows may begin afresh, and their chunk
may stay open; a row's anchor is then a state of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans.memory.backends.triton.elementary import (
    _activation,
    _dot,
    _kappa,
    _normalizer,
    _normed,
    _row_scale,
    _slope,
    _tile,
    _with_base,
)
from titans.memory.backends.triton.fragments import (
    _by_columns,
    _by_rows,
    _from_columns,
    _from_rows,
    _halves_added,
    _in_order,
    _overlaps,
    _times,
    _to_columns,
    _to_rows,
    _written,
)
from titans.memory.backends.triton.objective import _curvature, _loss, _objective


@triton.jit(do_not_specialize=["num_chunks", "num_units"])
def forward_kernel(
    queries, keys, values,
    read_weights, read_momentum, read_steps, end_weights, end_momentum, end_steps, momentum_momentum,
    momentum_steps, overlaps,
    gain, bias, steepness, base_up, base_down,
    fresh, complete, anchor_slot, initial_up, initial_down, initial_moments_up, initial_moments_down,
    weights_up, weights_down, moments_up, moments_down,
    reads, surprise,
    kept_weights_up, kept_weights_down, kept_moments_up, kept_moments_down, kept_anchor_up, kept_anchor_down,
    tape_outputs, tape_read, tape_features, tape_answers, tape_similarity, tape_squares, tape_kappa,
    scales_up, scales_down,
    num_chunks, num_rows, num_units, group,
    EPS: tl.constexpr, FLOOR: tl.constexpr, RADIUS: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, HAS_BASE: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, NORMALIZE: tl.constexpr, RESCALE: tl.constexpr,
    ACTIVATION: tl.constexpr, OBJECTIVE: tl.constexpr, PARAMETER: tl.constexpr, MARKED: tl.constexpr,
    TAPE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunks in sequence.

    States lie in slots, (slots, num_rows, …), of which the first is the anchor if MARKED. Without TAPE every
    chunk overwrites the state, and the anchor where it is complete. With TAPE a chunk writes the next slot,
    `anchor_slot` is where each finds its anchor, and what the backward needs is written too. KEEP: copy the
    state before every `group` chunks to `kept_…`. tape_outputs is written without TAPE too, one chunk over
    the other. overlaps: q · k of all tokens of each chunk, (chunks, num_rows, CHUNK, CHUNK).

    The weights are the left operands and the tokens the right ones: in this kernel a tile of tokens has a
    column for each token.
    """
    dtype: tl.constexpr = values.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    size = HIDDEN * DIM
    step = tl.arange(0, CHUNK)
    token, square = tl.trans(_tile(CHUNK, DIM)), tl.trans(_tile(CHUNK, CHUNK))
    wide = _by_columns(BLOCK, CHUNK, HIDDEN)
    up, down = _by_rows(BLOCK, DIM, DIM), _by_columns(BLOCK, DIM, HIDDEN)
    # Of W_down as it lies, to be multiplied by hidden units; and of anything that is copied.
    across = tl.arange(0, DIM)[:, None] * HIDDEN + tl.arange(0, BLOCK)[None, :]
    block = _tile(BLOCK, DIM)
    base_up += row * size
    base_down += row * size
    own = row * size
    before = own
    if MARKED:
        before += num_rows * size
    shift, offset = tl.zeros([DIM], tl.float32), tl.zeros([DIM], tl.float32)
    if NORM:
        shift = tl.load(gain + row * DIM + tl.arange(0, DIM))
        offset = tl.load(bias + row * DIM + tl.arange(0, DIM))

    for n in tl.range(num_chunks, disable_licm=True):
        here = n * num_rows + row
        layer = n * DEPTH * num_rows + row
        last = layer + (DEPTH - 1) * num_rows
        tokens, arrived = here * CHUNK * DIM, here * CHUNK * DIM
        if DEPTH == 1:
            arrived = here * CHUNK * HIDDEN
        after, seen = before, row * CHUNK * HIDDEN
        if TAPE:
            after += num_rows * size
            seen = here * CHUNK * HIDDEN
        anchored = before
        if MARKED:
            anchored = own
            if TAPE:
                anchored += tl.load(anchor_slot + here).to(tl.int64) * num_rows * size
            if tl.load(fresh + here) != 0:
                for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
                    at = begin * DIM + block
                    if DEPTH == 2:
                        w = tl.load(initial_up + own + at)
                        tl.store(weights_up + before + at, w)
                        tl.store(weights_up + anchored + at, w)
                        tl.store(moments_up + before + at, tl.load(initial_moments_up + own + at))
                    # Whatever the shape of its tiles, all of W_down is copied.
                    w = tl.load(initial_down + own + at)
                    tl.store(weights_down + before + at, w)
                    tl.store(weights_down + anchored + at, w)
                    tl.store(moments_down + before + at, tl.load(initial_moments_down + own + at))
                tl.debug_barrier()
        if KEEP and n % group == 0:
            into = ((n // group) * num_rows + row) * size
            for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
                at = begin * DIM + block
                if DEPTH == 2:
                    tl.store(kept_weights_up + into + at, tl.load(weights_up + before + at))
                    tl.store(kept_moments_up + into + at, tl.load(moments_up + before + at))
                tl.store(kept_weights_down + into + at, tl.load(weights_down + before + at))
                tl.store(kept_moments_down + into + at, tl.load(moments_down + before + at))
                if MARKED:
                    if DEPTH == 2:
                        tl.store(kept_anchor_up + into + at, tl.load(weights_up + anchored + at))
                    tl.store(kept_anchor_down + into + at, tl.load(weights_down + anchored + at))

        # Surprise at the anchor.
        k = tl.zeros([DIM, CHUNK], dtype)
        if DEPTH == 2 or RESIDUAL:
            k = tl.load(keys + arrived + token)
        q = k
        if DEPTH == 2 or RESIDUAL:
            q = tl.load(queries + arrived + token)
        features = tl.zeros([DIM, CHUNK], dtype)
        squares, whole = tl.zeros([BLOCK // 16, 8, CHUNK], dtype), tl.zeros([8, BLOCK // 4], dtype)
        for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
            if DEPTH == 2:
                at = begin * DIM + up
                w = _from_rows(tl.load(weights_up + before + at))
                read = _times(w, q, PRECISION) * tl.load(read_weights + layer * CHUNK + step)[None, :]
                total = w
                if MARKED:
                    total = _from_rows(tl.load(weights_up + anchored + at))
                if HAS_BASE:
                    b = _from_rows(tl.load(base_up + at))
                    read += _times(b, q, PRECISION)
                    total += b
                outputs = _times(total, k, PRECISION)
                s = _from_rows(tl.load(moments_up + before + at))
                read += _times(s, q, PRECISION) * tl.load(read_momentum + layer * CHUNK + step)[None, :]
                tl.store(tape_outputs + seen + begin + wide, _to_columns(outputs))
                tl.store(tape_read + seen + begin + wide, _to_columns(read))
                hidden = _activation(outputs, ACTIVATION)
            else:
                hidden = _from_columns(tl.load(keys + arrived + begin + wide))
            at = begin + across
            total = _with_base(tl.load(weights_down + anchored + at), base_down + at, HAS_BASE)
            features += _dot(total, _in_order(hidden), PRECISION)
            if NORMALIZE:
                squares += _halves_added(hidden * hidden)
                if DEPTH == 2:
                    # What a thread has of them.
                    parts = tl.reshape(total * total, (DIM // 8, 8, BLOCK // 4, 4))
                    whole += tl.sum(tl.sum(parts, 3), 0)
        squares = tl.sum(tl.sum(squares, 1), 0)
        v = tl.load(values + tokens + token)
        error, delta, _, scale = _objective(
            tl.trans(features), tl.trans(k), tl.trans(v), shift, offset, EPS, NORM, RESIDUAL, OBJECTIVE,
            PARAMETER,
        )  # fmt: skip
        tl.store(surprise + here * CHUNK + step, tl.sum(_loss(error, OBJECTIVE, PARAMETER), 1))
        if TAPE:
            tl.store(tape_features + tokens + token, features)
        # What each token's factors are multiplied by, to be added to the weights.
        by, by_up = squares * 0 - 1, squares * 0 - 1
        if NORMALIZE:
            curvature = _curvature(error, OBJECTIVE, PARAMETER)
            factor = squares * 0 + curvature
            if NORM:
                factor = curvature * scale * scale * tl.load(steepness + row)
            by = -1 / _normalizer(squares, factor, FLOOR, DEPTH)
            if TAPE:
                tl.store(tape_squares + here * CHUNK + step, squares)
            if DEPTH == 2:
                kappa = _kappa(tl.sum(tl.sum(whole, 1), 0), DIM, FLOOR)
                by_up = -1 / _normalizer(tl.sum(k * k, 0), factor * kappa, FLOOR, 2)
                if TAPE:
                    tl.store(tape_kappa + here, kappa)
        delta = tl.trans(delta)
        d = delta * by[None, :]

        # What is read and written, hidden units at a time.
        closes = True
        if MARKED:
            closes = tl.load(complete + here) != 0
        mixing = tl.load(overlaps + here * CHUNK * CHUNK + square)
        similarity = mixing
        # The outputs above, which another thread may have written.
        tl.debug_barrier()
        if DEPTH == 2:
            mixing *= tl.load(read_steps + layer * CHUNK * CHUNK + square)
            k_rows = tl.load(keys + arrived + _tile(CHUNK, DIM))
            for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
                at, into = begin * DIM + up, begin + down
                outputs = _from_columns(tl.load(tape_outputs + seen + begin + wide))
                total = _from_columns(
                    _with_base(tl.load(weights_down + anchored + into), base_down + into, HAS_BASE)
                )
                d_up = _times(total, delta, PRECISION) * _slope(outputs, ACTIVATION) * by_up[None, :]
                read = _from_columns(tl.load(tape_read + seen + begin + wide))
                read += _times(d_up, mixing, PRECISION)
                tl.store(tape_read + seen + begin + wide, _to_columns(read))
                w = _from_rows(tl.load(weights_up + before + at))
                s = _from_rows(tl.load(moments_up + before + at))
                w, s = _written(
                    w, s, d_up, k_rows, layer, end_weights, end_momentum, end_steps, momentum_momentum,
                    momentum_steps, PRECISION,
                )  # fmt: skip
                if RESCALE:
                    factors, kept = _row_scale(tl.sum(w * w, 1), RADIUS)
                    w *= tl.where(closes, factors, 1.0)[:, None]
                    if TAPE:
                        kept = tl.where(closes, kept, 0.0)
                        tl.store(
                            scales_up + here * HIDDEN + begin + tl.arange(0, BLOCK)[:, None],
                            _in_order(kept[:, None]),
                        )
                tl.store(weights_up + after + at, _to_rows(w))
                tl.store(moments_up + after + at, _to_rows(s))
                if MARKED and not TAPE:  # noqa: SIM102
                    if closes:
                        tl.store(weights_up + own + at, _to_rows(w))
            # What was read, which another thread may have written.
            tl.debug_barrier()
        # The layers in loops of their own, since each has tokens' factors of its own to keep.
        d_rows = tl.trans(d)
        out = tl.zeros([DIM, CHUNK], dtype)
        row_squares = tl.zeros([BLOCK // 16, 8, DIM], dtype)
        for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
            into, lying = begin + down, begin + across
            if DEPTH == 2:
                read = _from_columns(tl.load(tape_read + seen + begin + wide))
                read = _activation(read, ACTIVATION)
            else:
                read = _from_columns(tl.load(queries + arrived + begin + wide))
            asked = _in_order(read)
            # In this order: a product that a later one adds to has its warps one above the other.
            if HAS_BASE:
                out += _dot(tl.load(base_down + lying), asked, PRECISION)
            found = _dot(tl.load(weights_down + before + lying), asked, PRECISION)
            out += found * tl.load(read_weights + last * CHUNK + step)[None, :]
            found = _dot(tl.load(moments_down + before + lying), asked, PRECISION)
            out += found * tl.load(read_momentum + last * CHUNK + step)[None, :]
            if DEPTH == 2:
                outputs = _from_columns(tl.load(tape_outputs + seen + begin + wide))
                hidden = _activation(outputs, ACTIVATION)
            else:
                hidden = _from_columns(tl.load(keys + arrived + begin + wide))
            w = _from_columns(tl.load(weights_down + before + into))
            s = _from_columns(tl.load(moments_down + before + into))
            w, s = _written(
                w, s, hidden, d_rows, last, end_weights, end_momentum, end_steps, momentum_momentum,
                momentum_steps, PRECISION,
            )  # fmt: skip
            tl.store(weights_down + after + into, _to_columns(w))
            tl.store(moments_down + after + into, _to_columns(s))
            if RESCALE:
                row_squares += _halves_added(w * w)
        if DEPTH == 2:
            # In a loop of its own, where registers are left for it.
            tl.debug_barrier()
            PARTS: tl.constexpr = 1 if CHUNK >= 64 else 8 if BLOCK >= 128 else BLOCK // 16
            parts = tl.zeros([PARTS, CHUNK, CHUNK], dtype)
            for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
                outputs = _from_columns(tl.load(tape_outputs + seen + begin + wide))
                read = _from_columns(tl.load(tape_read + seen + begin + wide))
                hidden, read = _activation(outputs, ACTIVATION), _activation(read, ACTIVATION)
                parts += _overlaps(hidden, read, PARTS, PRECISION)
            similarity = tl.sum(parts, 0)
        if TAPE:
            tl.store(tape_similarity + here * CHUNK * CHUNK + square, similarity)
        out += _dot(d, similarity * tl.load(read_steps + last * CHUNK * CHUNK + square), PRECISION)
        if NORM:
            if TAPE:
                tl.store(tape_answers + tokens + token, out)
            out, _ = _normed(tl.trans(out), EPS)
            out = tl.trans(out * shift[None, :] + offset[None, :])
        if RESIDUAL:
            out += q
        tl.store(reads + tokens + token, out)

        # Rows of W_down are whole only now.
        if RESCALE or (MARKED and not TAPE):
            factors, kept = _row_scale(tl.sum(tl.sum(row_squares, 1), 0), RADIUS)
            if RESCALE and TAPE:
                kept = tl.where(closes, kept, 0.0)
                tl.store(scales_down + here * DIM + tl.arange(0, DIM), kept)
            tl.debug_barrier()
            if closes:
                for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
                    at = begin + across
                    w = tl.load(weights_down + after + at)
                    if RESCALE:
                        w *= factors[:, None]
                        tl.store(weights_down + after + at, w)
                    if MARKED and not TAPE:
                        tl.store(weights_down + own + at, w)
        before = after
        # What one thread has written of the state another may read next.
        tl.debug_barrier()
