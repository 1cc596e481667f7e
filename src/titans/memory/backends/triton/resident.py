"""The kernel of the scan, forward, for a memory whose weights and momentum stay in registers.

The algorithm is that of `forward.py`, with all hidden units at a time: the state is loaded before the first
chunk, and written after each for the backward, or after the last. No row begins afresh and no chunk stays
open, so that a chunk's anchor is the weights it begins with. `fits_registers` (`scan.py`) decides which
memories are so small.
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


@triton.jit(do_not_specialize=["num_chunks"])
def resident_kernel(
    queries, keys, values,
    read_weights, read_momentum, read_steps, end_weights, end_momentum, end_steps, momentum_momentum,
    momentum_steps,
    gain, bias, steepness, base_up, base_down,
    weights_up, weights_down, moments_up, moments_down,
    reads, surprise,
    kept_weights_up, kept_weights_down, kept_moments_up, kept_moments_down,
    tape_outputs, tape_read, tape_features, tape_answers, tape_similarity, tape_squares, tape_kappa,
    scales_up, scales_down,
    num_chunks, num_rows, group,
    EPS: tl.constexpr, FLOOR: tl.constexpr, RADIUS: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr,
    HIDDEN: tl.constexpr, DEPTH: tl.constexpr, HAS_BASE: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, NORMALIZE: tl.constexpr, RESCALE: tl.constexpr, ACTIVATION: tl.constexpr,
    OBJECTIVE: tl.constexpr, PARAMETER: tl.constexpr, TAPE: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Names, sizes, slots, TAPE and KEEP are those of `forward_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    size = HIDDEN * DIM
    own = row * size
    up, down = _tile(HIDDEN, DIM), _tile(DIM, HIDDEN)
    step, square = tl.arange(0, CHUNK), _tile(CHUNK, CHUNK)
    token, wide = _tile(CHUNK, DIM), _tile(CHUNK, HIDDEN)
    # Of keys and queries, which are the hidden units of a linear memory.
    width: tl.constexpr = HIDDEN if DEPTH == 1 else DIM
    arriving = _tile(CHUNK, width)
    base_up += own
    base_down += own
    shift, offset = tl.zeros([DIM], tl.float32), tl.zeros([DIM], tl.float32)
    if NORM:
        shift = tl.load(gain + row * DIM + tl.arange(0, DIM))
        offset = tl.load(bias + row * DIM + tl.arange(0, DIM))
    w_down, s_down = tl.load(weights_down + own + down), tl.load(moments_down + own + down)
    w_up, s_up = w_down, s_down
    if DEPTH == 2:
        w_up, s_up = tl.load(weights_up + own + up), tl.load(moments_up + own + up)

    for turn in tl.range(num_chunks, disable_licm=True):
        # It is `turn`, which the compiler must not know: it would count up an address for each tensor.
        n = tl.minimum(turn, num_chunks - 1)
        here = n * num_rows + row
        layer = n * DEPTH * num_rows + row
        last = layer + (DEPTH - 1) * num_rows
        tokens, seen = here * CHUNK * DIM, here * CHUNK * HIDDEN
        after = (here + num_rows) * size
        if KEEP and n % group == 0:
            into = ((n // group) * num_rows + row) * size
            if DEPTH == 2:
                tl.store(kept_weights_up + into + up, w_up)
                tl.store(kept_moments_up + into + up, s_up)
            tl.store(kept_weights_down + into + down, w_down)
            tl.store(kept_moments_down + into + down, s_down)

        # Surprise.
        arrived = here * CHUNK * width + arriving
        k, q = tl.load(keys + arrived), tl.load(queries + arrived)
        outputs, hidden = k, k
        if DEPTH == 2:
            total = _with_base(w_up, base_up + up, HAS_BASE)
            outputs = _dot(k, tl.trans(total), PRECISION)
            hidden = _activation(outputs, ACTIVATION)
        total = _with_base(w_down, base_down + down, HAS_BASE)
        features = _dot(hidden, tl.trans(total), PRECISION)
        error, delta, _, scale = _objective(
            features, k, tl.load(values + tokens + token), shift, offset, EPS, NORM, RESIDUAL, OBJECTIVE,
            PARAMETER,
        )  # fmt: skip
        tl.store(surprise + here * CHUNK + step, tl.sum(_loss(error, OBJECTIVE, PARAMETER), 1))
        d = delta
        squares = tl.sum(hidden * hidden, 1)
        divisor = squares
        if NORMALIZE:
            curvature = _curvature(error, OBJECTIVE, PARAMETER)
            factor = squares * 0 + curvature
            if NORM:
                factor = curvature * scale * scale * tl.load(steepness + row)
            d /= _normalizer(squares, factor, FLOOR, DEPTH)[:, None]
            if TAPE:
                tl.store(tape_squares + here * CHUNK + step, squares)
            if DEPTH == 2:
                kappa = _kappa(tl.sum(tl.sum(total * total, 1), 0), DIM, FLOOR)
                divisor = _normalizer(tl.sum(k * k, 1), factor * kappa, FLOOR, 2)
                if TAPE:
                    tl.store(tape_kappa + here, kappa)
        if TAPE:
            tl.store(tape_features + tokens + token, features)
            if DEPTH == 2:
                tl.store(tape_outputs + seen + wide, outputs)

        # The layer below is read, then written.
        read = q
        if DEPTH == 2:
            d_up = _dot(delta, total, PRECISION) * _slope(outputs, ACTIVATION)
            if NORMALIZE:
                d_up /= divisor[:, None]
            mixing = _dot(q, tl.trans(k), PRECISION) * tl.load(read_steps + layer * CHUNK * CHUNK + square)
            weigh = tl.load(read_weights + layer * CHUNK + step)[:, None]
            carry = tl.load(read_momentum + layer * CHUNK + step)[:, None]
            read = _dot(q, tl.trans(w_up), PRECISION) * weigh + _dot(q, tl.trans(s_up), PRECISION) * carry
            if HAS_BASE:
                read += _dot(q, tl.trans(tl.load(base_up + up)), PRECISION)
            read -= _dot(mixing, d_up, PRECISION)
            if TAPE:
                tl.store(tape_read + seen + wide, read)
            w_up, s_up = _moved(
                w_up, s_up, d_up, k, layer,
                end_weights, end_momentum, end_steps, momentum_momentum, momentum_steps, CHUNK, False,
                PRECISION,
            )  # fmt: skip
            if RESCALE:
                factors, kept = _row_scale(tl.sum(w_up * w_up, 1), RADIUS)
                w_up *= factors[:, None]
                if TAPE:
                    tl.store(scales_up + here * HIDDEN + tl.arange(0, HIDDEN), kept)
            if TAPE:
                tl.store(weights_up + after + up, w_up)
                tl.store(moments_up + after + up, s_up)
            read = _activation(read, ACTIVATION)

        # The layer that answers.
        weigh = tl.load(read_weights + last * CHUNK + step)[:, None]
        carry = tl.load(read_momentum + last * CHUNK + step)[:, None]
        out = _dot(read * weigh, tl.trans(w_down), PRECISION)
        out += _dot(read * carry, tl.trans(s_down), PRECISION)
        if HAS_BASE:
            out += _dot(read, tl.trans(tl.load(base_down + down)), PRECISION)
        similarity = _dot(read, tl.trans(hidden), PRECISION)
        if TAPE:
            tl.store(tape_similarity + here * CHUNK * CHUNK + square, similarity)
        out -= _dot(similarity * tl.load(read_steps + last * CHUNK * CHUNK + square), d, PRECISION)
        w_down, s_down = _moved(
            w_down, s_down, d, hidden, last,
            end_weights, end_momentum, end_steps, momentum_momentum, momentum_steps, CHUNK, False, PRECISION,
        )  # fmt: skip
        if RESCALE:
            factors, kept = _row_scale(tl.sum(w_down * w_down, 1), RADIUS)
            w_down *= factors[:, None]
            if TAPE:
                tl.store(scales_down + here * DIM + tl.arange(0, DIM), kept)
        if TAPE:
            tl.store(weights_down + after + down, w_down)
            tl.store(moments_down + after + down, s_down)
        if NORM:
            if TAPE:
                tl.store(tape_answers + tokens + token, out)
            out, _ = _normed(out, EPS)
            out = out * shift[None, :] + offset[None, :]
        if RESIDUAL:
            out += q
        tl.store(reads + tokens + token, out)

    if not TAPE:
        if DEPTH == 2:
            tl.store(weights_up + own + up, w_up)
            tl.store(moments_up + own + up, s_up)
        tl.store(weights_down + own + down, w_down)
        tl.store(moments_down + own + down, s_down)
