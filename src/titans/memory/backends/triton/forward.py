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
from titans.memory.backends.triton.objective import _curvature, _loss, _objective
from titans.memory.backends.triton.update import _moved


@triton.jit(do_not_specialize=["num_chunks", "num_units"])
def forward_kernel(
    queries, keys, values,
    read_weights, read_momentum, read_steps, end_weights, end_momentum, end_steps, momentum_momentum,
    momentum_steps,
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
    the other.
    """
    dtype: tl.constexpr = values.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    size = HIDDEN * DIM
    up, down = _tile(BLOCK, DIM), tl.arange(0, DIM)[:, None] * HIDDEN + tl.arange(0, BLOCK)[None, :]
    step, square, token = tl.arange(0, CHUNK), _tile(CHUNK, CHUNK), _tile(CHUNK, DIM)
    wide = step[:, None] * HIDDEN + tl.arange(0, BLOCK)[None, :]
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
                    at = begin * DIM + up
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
                at = begin * DIM + up
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
        k = tl.zeros([CHUNK, DIM], dtype)
        if DEPTH == 2 or RESIDUAL:
            k = tl.load(keys + arrived + token)
        features = tl.zeros([CHUNK, DIM], dtype)
        squares, row_squares = tl.zeros([CHUNK], dtype), tl.zeros([DIM], dtype)
        for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
            if DEPTH == 2:
                at = begin * DIM + up
                total = _with_base(tl.load(weights_up + anchored + at), base_up + at, HAS_BASE)
                outputs = _dot(k, tl.trans(total), PRECISION)
                tl.store(tape_outputs + seen + begin + wide, outputs)
                hidden = _activation(outputs, ACTIVATION)
            else:
                hidden = tl.load(keys + arrived + begin + wide)
            at = begin + down
            total = _with_base(tl.load(weights_down + anchored + at), base_down + at, HAS_BASE)
            features += _dot(hidden, tl.trans(total), PRECISION)
            if NORMALIZE:
                squares += tl.sum(hidden * hidden, 1)
                if DEPTH == 2:
                    row_squares += tl.sum(total * total, 1)
        error, delta, _, scale = _objective(
            features, k, tl.load(values + tokens + token), shift, offset, EPS, NORM, RESIDUAL, OBJECTIVE,
            PARAMETER,
        )  # fmt: skip
        tl.store(surprise + here * CHUNK + step, tl.sum(_loss(error, OBJECTIVE, PARAMETER), 1))
        if TAPE:
            tl.store(tape_features + tokens + token, features)
        d, divisor = delta, squares
        if NORMALIZE:
            curvature = _curvature(error, OBJECTIVE, PARAMETER)
            factor = squares * 0 + curvature
            if NORM:
                factor = curvature * scale * scale * tl.load(steepness + row)
            d /= _normalizer(squares, factor, FLOOR, DEPTH)[:, None]
            if TAPE:
                tl.store(tape_squares + here * CHUNK + step, squares)
            if DEPTH == 2:
                kappa = _kappa(row_squares, FLOOR)
                divisor = _normalizer(tl.sum(k * k, 1), factor * kappa, FLOOR, 2)
                if TAPE:
                    tl.store(tape_kappa + here, kappa)

        # What is read and written, hidden units at a time.
        q = k
        if DEPTH == 2 or RESIDUAL:
            q = tl.load(queries + arrived + token)
        closes = True
        if MARKED:
            closes = tl.load(complete + here) != 0
        out = tl.zeros([CHUNK, DIM], dtype)
        row_squares = tl.zeros([DIM], dtype)
        if DEPTH == 2:
            mixing_up = _dot(q, tl.trans(k), PRECISION) * tl.load(read_steps + layer * CHUNK * CHUNK + square)
        # The outputs above, which another thread may have written.
        tl.debug_barrier()
        for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
            at = begin + down
            if DEPTH == 2:
                outputs = tl.load(tape_outputs + seen + begin + wide)
                total = _with_base(tl.load(weights_down + anchored + at), base_down + at, HAS_BASE)
                d_up = _dot(delta, total, PRECISION) * _slope(outputs, ACTIVATION)
                if NORMALIZE:
                    d_up /= divisor[:, None]
                into = begin * DIM + up
                w, s = tl.load(weights_up + before + into), tl.load(moments_up + before + into)
                read = _dot(q, tl.trans(w), PRECISION) * tl.load(read_weights + layer * CHUNK + step)[:, None]
                read += (
                    _dot(q, tl.trans(s), PRECISION) * tl.load(read_momentum + layer * CHUNK + step)[:, None]
                )
                if HAS_BASE:
                    read += _dot(q, tl.trans(tl.load(base_up + into)), PRECISION)
                read -= _dot(mixing_up, d_up, PRECISION)
                w, s = _moved(
                    w, s, d_up, k, layer,
                    end_weights, end_momentum, end_steps, momentum_momentum, momentum_steps, CHUNK, False,
                    PRECISION,
                )  # fmt: skip
                if RESCALE:
                    factors, kept = _row_scale(tl.sum(w * w, 1), RADIUS)
                    w *= tl.where(closes, factors, 1.0)[:, None]
                    if TAPE:
                        kept = tl.where(closes, kept, 0.0)
                        tl.store(scales_up + here * HIDDEN + begin + tl.arange(0, BLOCK), kept)
                tl.store(weights_up + after + into, w)
                tl.store(moments_up + after + into, s)
                if MARKED and not TAPE:  # noqa: SIM102
                    if closes:
                        tl.store(weights_up + own + into, w)
                tl.store(tape_read + seen + begin + wide, read)
                hidden, read = _activation(outputs, ACTIVATION), _activation(read, ACTIVATION)
            else:
                hidden = tl.load(keys + arrived + begin + wide)
                read = tl.load(queries + arrived + begin + wide)
            w, s = tl.load(weights_down + before + at), tl.load(moments_down + before + at)
            weigh = tl.load(read_weights + last * CHUNK + step)[:, None]
            carry = tl.load(read_momentum + last * CHUNK + step)[:, None]
            out += _dot(read * weigh, tl.trans(w), PRECISION) + _dot(read * carry, tl.trans(s), PRECISION)
            if HAS_BASE:
                out += _dot(read, tl.trans(tl.load(base_down + at)), PRECISION)
            w, s = _moved(
                w, s, d, hidden, last,
                end_weights, end_momentum, end_steps, momentum_momentum, momentum_steps, CHUNK, True,
                PRECISION,
            )  # fmt: skip
            tl.store(weights_down + after + at, w)
            tl.store(moments_down + after + at, s)
            if RESCALE:
                row_squares += tl.sum(w * w, 1)
        # In a loop of its own: next to a square product the compiler has every warp do all of the others.
        tl.debug_barrier()
        similarity = tl.zeros([CHUNK, CHUNK], dtype)
        for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
            if DEPTH == 2:
                hidden = _activation(tl.load(tape_outputs + seen + begin + wide), ACTIVATION)
                read = _activation(tl.load(tape_read + seen + begin + wide), ACTIVATION)
            else:
                hidden = tl.load(keys + arrived + begin + wide)
                read = tl.load(queries + arrived + begin + wide)
            similarity += _dot(read, tl.trans(hidden), PRECISION)
        if TAPE:
            tl.store(tape_similarity + here * CHUNK * CHUNK + square, similarity)
        out -= _dot(similarity * tl.load(read_steps + last * CHUNK * CHUNK + square), d, PRECISION)
        if NORM:
            if TAPE:
                tl.store(tape_answers + tokens + token, out)
            out, _ = _normed(out, EPS)
            out = out * shift[None, :] + offset[None, :]
        if RESIDUAL:
            out += q
        tl.store(reads + tokens + token, out)

        # Rows of W_down are whole only now.
        if RESCALE or (MARKED and not TAPE):
            factors, kept = _row_scale(row_squares, RADIUS)
            if RESCALE and TAPE:
                kept = tl.where(closes, kept, 0.0)
                tl.store(scales_down + here * DIM + tl.arange(0, DIM), kept)
            tl.debug_barrier()
            if closes:
                for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
                    at = begin + down
                    w = tl.load(weights_down + after + at)
                    if RESCALE:
                        w *= factors[:, None]
                        tl.store(weights_down + after + at, w)
                    if MARKED and not TAPE:
                        tl.store(weights_down + own + at, w)
        before = after
        # What one thread has written of the state another may read next.
        tl.debug_barrier()
