"""The kernel of the scan, backward: chunks in reverse, from the tape that `forward.py` has written.

Names and sizes are those of the forward. The gradients of the state and of the base are carried in memory, in
place, a tile of each in registers at a time. There are three passes over a chunk: the layer that answers, the
layer below it if there is one, and then what was found at the anchor, by which time the gradient of the error
is whole.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans.memory.backends.triton.elementary import (
    _across,
    _activation,
    _bend,
    _dot,
    _normalizer,
    _normalizer_slopes,
    _normed,
    _slope,
    _tile,
    _unsettle,
    _with_base,
)
from titans.memory.backends.triton.objective import _curvature, _objective, _objective_backward
from titans.memory.backends.triton.update import _add, _moved_backward, _outer


@triton.jit(do_not_specialize=["num_chunks", "num_units"])
def backward_kernel(
    queries, keys, values,
    read_weights, read_momentum, read_steps, end_weights, end_momentum, end_steps, momentum_momentum,
    momentum_steps,
    gain, bias, steepness, base_up, base_down,
    fresh, anchor_slot,
    weights_up, weights_down, moments_up, moments_down,
    tape_outputs, tape_read, tape_features, tape_answers, tape_similarity, tape_squares, tape_kappa,
    scales_up, scales_down,
    work_read, work_hidden, work_delta, work_tokens,
    grad_reads,
    grad_weights_up, grad_weights_down, grad_moments_up, grad_moments_down, grad_anchor_up, grad_anchor_down,
    grad_initial_up, grad_initial_down, grad_initial_moments_up, grad_initial_moments_down,
    grad_base_up, grad_base_down, grad_gain, grad_bias, grad_steepness,
    grad_queries, grad_keys, grad_values,
    grad_read_weights, grad_read_momentum, grad_read_steps, grad_end_weights, grad_end_momentum,
    grad_end_steps, grad_momentum_momentum, grad_momentum_steps,
    num_chunks, num_rows, num_units,
    EPS: tl.constexpr, FLOOR: tl.constexpr, RADIUS: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, HAS_BASE: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, NORMALIZE: tl.constexpr, RESCALE: tl.constexpr,
    ACTIVATION: tl.constexpr, OBJECTIVE: tl.constexpr, PARAMETER: tl.constexpr, MARKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_weights … grad_anchor: of the state that was left, and at the end of that which was begun with.

    What is found at an anchor has its gradient added to grad_anchor, which is grad_weights itself unless
    MARKED. work_…: room for (CHUNK, HIDDEN) of each row.
    """
    dtype: tl.constexpr = values.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    size = HIDDEN * DIM
    up, down = _tile(BLOCK, DIM), tl.arange(0, DIM)[:, None] * HIDDEN + tl.arange(0, BLOCK)[None, :]
    step, square, token = tl.arange(0, CHUNK), _tile(CHUNK, CHUNK), _tile(CHUNK, DIM)
    wide = step[:, None] * HIDDEN + tl.arange(0, BLOCK)[None, :]
    own = row * size
    base_up += own
    base_down += own
    grad_weights_up += own
    grad_weights_down += own
    grad_moments_up += own
    grad_moments_down += own
    grad_anchor_up += own
    grad_anchor_down += own
    grad_initial_up += own
    grad_initial_down += own
    grad_initial_moments_up += own
    grad_initial_moments_down += own
    grad_base_up += own
    grad_base_down += own
    work_read += row * CHUNK * HIDDEN
    work_hidden += row * CHUNK * HIDDEN
    work_delta += row * CHUNK * HIDDEN
    work_tokens += 3 * row * CHUNK * DIM
    shift, offset = tl.zeros([DIM], tl.float32), tl.zeros([DIM], tl.float32)
    steep = 1.0
    if NORM:
        shift = tl.load(gain + row * DIM + tl.arange(0, DIM))
        offset = tl.load(bias + row * DIM + tl.arange(0, DIM))
        steep = tl.load(steepness + row)
        by_gain, by_bias, by_steepness = shift * 0, shift * 0, steep * 0

    for back in tl.range(num_chunks, disable_licm=True):
        n = num_chunks - 1 - back
        here = n * num_rows + row
        layer = n * DEPTH * num_rows + row
        last = layer + (DEPTH - 1) * num_rows
        tokens, arrived, seen = here * CHUNK * DIM, here * CHUNK * DIM, here * CHUNK * HIDDEN
        if DEPTH == 1:
            arrived = seen
        slot = n
        if MARKED:
            slot += 1
        state = (slot * num_rows + row) * size
        after, anchored = state + num_rows * size, state
        if MARKED:
            anchored = (tl.load(anchor_slot + here).to(tl.int64) * num_rows + row) * size

        # What the forward knew of each token.
        features, v = tl.load(tape_features + tokens + token), tl.load(values + tokens + token)
        k = v
        if DEPTH == 2 or RESIDUAL:
            k = tl.load(keys + arrived + token)
        error, delta, _, scale = _objective(
            features, k, v, shift, offset, EPS, NORM, RESIDUAL, OBJECTIVE, PARAMETER
        )
        d = delta
        squares = tl.zeros([CHUNK], dtype)
        curvature = _curvature(error, OBJECTIVE, PARAMETER)
        factor = squares + curvature
        if NORMALIZE:
            squares = tl.load(tape_squares + here * CHUNK + step)
            if NORM:
                factor = curvature * scale * scale * steep
            divisor = _normalizer(squares, factor, FLOOR, DEPTH)
            d /= divisor[:, None]
        go = tl.load(grad_reads + tokens + token)
        g = go
        if NORM:
            answer, sharp = _normed(tl.load(tape_answers + tokens + token), EPS)
            by_gain += tl.sum(go * answer, 0)
            by_bias += tl.sum(go, 0)
            g = sharp[:, None] * _across(go * shift[None, :], answer)
        tl.store(work_tokens + token, g)
        tl.store(work_tokens + CHUNK * DIM + token, d)
        tl.store(work_tokens + 2 * CHUNK * DIM + token, delta)
        tl.debug_barrier()

        # The layer that answers.
        along = tl.zeros([DIM], dtype)
        if RESCALE:
            factors = tl.load(scales_down + here * DIM + tl.arange(0, DIM))
            for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
                at = begin + down
                along += tl.sum(tl.load(weights_down + after + at) * tl.load(grad_weights_down + at), 1)
        mix = tl.load(read_steps + last * CHUNK * CHUNK + square)
        by_mixing = -_dot(g, tl.trans(d), PRECISION)
        grad_mixing = by_mixing * mix
        gd = tl.zeros([CHUNK, DIM], dtype)
        by_weigh, by_carry = tl.zeros([CHUNK], dtype), tl.zeros([CHUNK], dtype)
        by_end, by_past = tl.zeros([CHUNK], dtype), tl.zeros([CHUNK], dtype)
        by_kept, by_moved, by_carried = (
            tl.zeros([DIM], dtype),
            tl.zeros([DIM], dtype),
            tl.zeros([DIM], dtype),
        )
        for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
            at = begin + down
            g, d = tl.load(work_tokens + token), tl.load(work_tokens + CHUNK * DIM + token)
            if DEPTH == 2:
                hidden = _activation(tl.load(tape_outputs + seen + begin + wide), ACTIVATION)
                raw = tl.load(tape_read + seen + begin + wide)
                read = _activation(raw, ACTIVATION)
            else:
                hidden = tl.load(keys + arrived + begin + wide)
                read = tl.load(queries + arrived + begin + wide)
            gh = _dot(tl.trans(grad_mixing), read, PRECISION)
            gr = _dot(grad_mixing, hidden, PRECISION)
            if HAS_BASE:
                gr += _dot(g, tl.load(base_down + at), PRECISION)
                _add(grad_base_down + at, _outer(g, read, True, PRECISION))
            gw = tl.load(grad_weights_down + at)
            if RESCALE:
                gw = _unsettle(tl.load(weights_down + after + at), factors, gw, along, RADIUS)
            gr, gh, gd, by_weigh, by_carry, by_end, by_past, by_kept, by_moved, by_carried = _moved_backward(
                read, hidden, d, g, gw, gr, gh, gd, by_weigh, by_carry, by_end, by_past, by_kept, by_moved,
                by_carried, last,
                read_weights, read_momentum, end_weights, end_momentum, end_steps, momentum_momentum,
                momentum_steps,
                weights_down + state + at, moments_down + state + at, grad_weights_down + at,
                grad_moments_down + at,
                CHUNK, True, PRECISION,
            )  # fmt: skip
            tl.store(work_hidden + begin + wide, gh)
            if DEPTH == 2:
                tl.store(work_read + begin + wide, gr * _slope(raw, ACTIVATION))
            else:
                if RESIDUAL:
                    gr += tl.load(grad_reads + tokens + begin + wide)
                tl.store(grad_queries + arrived + begin + wide, gr)
        tl.store(grad_read_weights + last * CHUNK + step, by_weigh)
        tl.store(grad_read_momentum + last * CHUNK + step, by_carry)
        similarity = tl.load(tape_similarity + here * CHUNK * CHUNK + square)
        tl.store(grad_read_steps + last * CHUNK * CHUNK + square, by_mixing * similarity)
        tl.store(grad_end_weights + last, tl.sum(by_kept, 0))
        tl.store(grad_end_momentum + last, tl.sum(by_moved, 0))
        tl.store(grad_end_steps + last * CHUNK + step, by_end)
        tl.store(grad_momentum_momentum + last, tl.sum(by_carried, 0))
        tl.store(grad_momentum_steps + last * CHUNK + step, by_past)
        gd -= _dot(tl.trans(similarity * mix), g, PRECISION)
        grad_factor = tl.zeros([CHUNK], dtype)
        grad_squares = grad_factor
        if NORMALIZE:
            gd /= divisor[:, None]
            grad_squares, grad_factor = _normalizer_slopes(squares, factor, FLOOR, DEPTH, -tl.sum(gd * d, 1))
        tl.debug_barrier()

        # The layer below, and the inner backward pass through which it learned.
        gk = tl.zeros([CHUNK, DIM], dtype)
        grad_kappa = 0.0
        if DEPTH == 2:
            q = tl.load(queries + tokens + token)
            gq = tl.zeros([CHUNK, DIM], dtype)
            mix = tl.load(read_steps + layer * CHUNK * CHUNK + square)
            similarity = _dot(q, tl.trans(k), PRECISION)
            mixing = similarity * mix
            by_weigh, by_carry = tl.zeros([CHUNK], dtype), tl.zeros([CHUNK], dtype)
            by_end, by_past, lost = (
                tl.zeros([CHUNK], dtype),
                tl.zeros([CHUNK], dtype),
                tl.zeros([CHUNK], dtype),
            )
            by_kept, by_moved, by_carried = (
                tl.zeros([BLOCK], dtype),
                tl.zeros([BLOCK], dtype),
                tl.zeros([BLOCK], dtype),
            )
            if NORMALIZE:
                kappa = tl.load(tape_kappa + here)
                key_squares = tl.sum(k * k, 1)
                divisor = _normalizer(key_squares, factor * kappa, FLOOR, 2)
            by_delta = tl.zeros([CHUNK, DIM], dtype)
            for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
                at, into = begin * DIM + up, begin + down
                k, q = tl.load(keys + tokens + token), tl.load(queries + tokens + token)
                delta = tl.load(work_tokens + 2 * CHUNK * DIM + token)
                outputs = tl.load(tape_outputs + seen + begin + wide)
                slope = _slope(outputs, ACTIVATION)
                total = _with_base(tl.load(weights_down + anchored + into), base_down + into, HAS_BASE)
                above = _dot(delta, total, PRECISION)
                d_up = above * slope
                if NORMALIZE:
                    d_up /= divisor[:, None]
                g_up = tl.load(work_read + begin + wide)
                tl.store(work_delta + begin + wide, d_up)
                if HAS_BASE:
                    gq += _dot(g_up, tl.load(base_up + at), PRECISION)
                    _add(grad_base_up + at, _outer(g_up, q, False, PRECISION))
                gw = tl.load(grad_weights_up + at)
                if RESCALE:
                    lengths = tl.load(scales_up + here * HIDDEN + begin + tl.arange(0, BLOCK))
                    settled = tl.load(weights_up + after + at)
                    gw = _unsettle(settled, lengths, gw, tl.sum(settled * gw, 1), RADIUS)
                gd_up = -_dot(tl.trans(mixing), g_up, PRECISION)
                gq, gk, gd_up, by_weigh, by_carry, by_end, by_past, by_kept, by_moved, by_carried = (
                    _moved_backward(
                        q, k, d_up, g_up, gw, gq, gk, gd_up, by_weigh, by_carry, by_end, by_past, by_kept,
                        by_moved, by_carried, layer,
                        read_weights, read_momentum, end_weights, end_momentum, end_steps, momentum_momentum,
                        momentum_steps,
                        weights_up + state + at, moments_up + state + at, grad_weights_up + at,
                        grad_moments_up + at,
                        CHUNK, False, PRECISION,
                    )
                )  # fmt: skip

                if NORMALIZE:
                    gd_up /= divisor[:, None]
                    lost += tl.sum(gd_up * d_up, 1)
                total = _with_base(tl.load(weights_down + anchored + into), base_down + into, HAS_BASE)
                delta = tl.load(work_tokens + 2 * CHUNK * DIM + token)
                ga = gd_up * slope
                by_delta += _dot(ga, tl.trans(total), PRECISION)
                found = _outer(delta, ga, True, PRECISION)
                _add(grad_anchor_down + into, found)
                if HAS_BASE:
                    _add(grad_base_down + into, found)
                gz = tl.load(work_hidden + begin + wide) * slope + gd_up * above * _bend(outputs, ACTIVATION)
                tl.store(work_hidden + begin + wide, gz)
            gd += by_delta
            tl.debug_barrier()
            by_mixing = tl.zeros([CHUNK, CHUNK], dtype)
            for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
                d_up = tl.load(work_delta + begin + wide)
                by_mixing -= _dot(tl.load(work_read + begin + wide), tl.trans(d_up), PRECISION)
            tl.store(grad_read_steps + layer * CHUNK * CHUNK + square, by_mixing * similarity)
            by_mixing *= mix
            gq += _dot(by_mixing, k, PRECISION)
            gk += _dot(tl.trans(by_mixing), q, PRECISION)
            if RESIDUAL:
                gq += tl.load(grad_reads + tokens + token)
            tl.store(grad_queries + tokens + token, gq)
            tl.store(grad_read_weights + layer * CHUNK + step, by_weigh)
            tl.store(grad_read_momentum + layer * CHUNK + step, by_carry)
            tl.store(grad_end_weights + layer, tl.sum(by_kept, 0))
            tl.store(grad_end_momentum + layer, tl.sum(by_moved, 0))
            tl.store(grad_end_steps + layer * CHUNK + step, by_end)
            tl.store(grad_momentum_momentum + layer, tl.sum(by_carried, 0))
            tl.store(grad_momentum_steps + layer * CHUNK + step, by_past)
            if NORMALIZE:
                by_keys, by_both = _normalizer_slopes(key_squares, factor * kappa, FLOOR, 2, -lost)
                gk += 2 * k * by_keys[:, None]
                grad_factor += by_both * kappa
                grad_kappa = tl.sum(by_both * factor, 0)

        # What was found at the anchor. Here and above, what is cheap to have again is not kept in registers.
        features, v = tl.load(tape_features + tokens + token), tl.load(values + tokens + token)
        if RESIDUAL:
            k = tl.load(keys + arrived + token)
        error, _, normed, scale = _objective(
            features, k, v, shift, offset, EPS, NORM, RESIDUAL, OBJECTIVE, PARAMETER
        )
        by_error, gf, more_gain, more_steepness = _objective_backward(
            gd, error, normed, scale, steep, grad_factor, shift, NORM, OBJECTIVE, PARAMETER
        )
        if NORM:
            by_gain += more_gain
            by_bias += tl.sum(by_error, 0)
            by_steepness += more_steepness
        tl.store(grad_values + tokens + token, -by_error)
        tl.store(work_tokens + token, gf)
        if RESIDUAL:
            gk += by_error
        tl.debug_barrier()
        for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
            at, into = begin * DIM + up, begin + down
            gf = tl.load(work_tokens + token)
            total = _with_base(tl.load(weights_down + anchored + into), base_down + into, HAS_BASE)
            if DEPTH == 2:
                outputs = tl.load(tape_outputs + seen + begin + wide)
                hidden = _activation(outputs, ACTIVATION)
            else:
                hidden = tl.load(keys + arrived + begin + wide)
            gh = _dot(gf, total, PRECISION) + 2 * hidden * grad_squares[:, None]
            found = _outer(gf, hidden, True, PRECISION)
            if NORMALIZE and DEPTH == 2:
                found += 2.5538 * total * grad_kappa
            _add(grad_anchor_down + into, found)
            if HAS_BASE:
                _add(grad_base_down + into, found)
            rest = tl.load(work_hidden + begin + wide)
            if DEPTH == 2:
                gz = gh * _slope(outputs, ACTIVATION) + rest
                k = tl.load(keys + tokens + token)
                found = _outer(gz, k, False, PRECISION)
                _add(grad_anchor_up + at, found)
                if HAS_BASE:
                    _add(grad_base_up + at, found)
                total = _with_base(tl.load(weights_up + anchored + at), base_up + at, HAS_BASE)
                gk += _dot(gz, total, PRECISION)
            else:
                if RESIDUAL:
                    rest -= tl.load(grad_values + tokens + begin + wide)
                tl.store(grad_keys + arrived + begin + wide, gh + rest)
        if DEPTH == 2:
            tl.store(grad_keys + tokens + token, gk)
        # What one thread has written of these gradients another may read next.
        tl.debug_barrier()
        if MARKED:
            begins = tl.load(fresh + here) != 0
            if tl.load(anchor_slot + here) == slot:
                for begin in tl.range(0, num_units, BLOCK, disable_licm=True):
                    at = begin * DIM + up
                    if DEPTH == 2:
                        _join(
                            begins, grad_weights_up + at, grad_anchor_up + at, grad_moments_up + at,
                            grad_initial_up + at, grad_initial_moments_up + at,
                        )  # fmt: skip
                    _join(
                        begins, grad_weights_down + at, grad_anchor_down + at, grad_moments_down + at,
                        grad_initial_down + at, grad_initial_moments_down + at,
                    )  # fmt: skip
                tl.debug_barrier()
    if NORM:
        _add(grad_gain + row * DIM + tl.arange(0, DIM), by_gain)
        _add(grad_bias + row * DIM + tl.arange(0, DIM), by_bias)
        _add(grad_steepness + row, by_steepness)


@triton.jit
def _join(begins, weights, anchor, moments, initial, initial_moments):
    """Gradients where a chunk began with its weights as its anchor: one for both, and for `initial` where the
    row began afresh."""
    grad, moment = tl.load(weights) + tl.load(anchor), tl.load(moments)
    tl.store(anchor, grad * 0)
    if begins:
        _add(initial, grad)
        _add(initial_moments, moment)
        grad *= 0
        moment *= 0
    tl.store(weights, grad)
    tl.store(moments, moment)
