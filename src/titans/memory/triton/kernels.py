"""Two Triton kernels, forward and backward: one program for each head of each row, chunk after chunk.

The algorithm is that of `chunk.py`, with its names; read it there. A chunk's tokens are rows of a tile
(CHUNK, DIM), weights are (HIDDEN, DIM) and (DIM, HIDDEN). docs/triton.md says where the data is and what
bounds the time. FLOOR: the squared `length_floor`. RADIUS: the `row_limit`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans.memory.triton.elementary import (
    _activation,
    _bend,
    _kappa,
    _normalizer,
    _normalizer_slopes,
    _settle,
    _slope,
    _tile,
    _unsettle,
)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _layer_forward(
    x, h, d, w, layer, moments, moments_after, base,
    read_weights, read_momentum, read_steps, end_weights, end_momentum, end_steps, momentum_momentum,
    momentum_steps,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BASE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What a layer of weights w (ROWS, COLUMNS) reads at x, (CHUNK, ROWS), and its weights after the chunk.

    x, h: inputs of the read and of what is written, (CHUNK, COLUMNS). d: scaled deltas, (CHUNK, ROWS). layer:
    the row of its coefficients. The momentum goes from memory to memory.
    """
    tile, square, step = _tile(ROWS, COLUMNS), _tile(CHUNK, CHUNK), tl.arange(0, CHUNK)
    s = tl.load(moments + tile)
    out = _dot(x, tl.trans(w), PRECISION) * tl.load(read_weights + layer * CHUNK + step)[:, None]
    out += _dot(x, tl.trans(s), PRECISION) * tl.load(read_momentum + layer * CHUNK + step)[:, None]
    if HAS_BASE:
        out += _dot(x, tl.trans(tl.load(base + tile)), PRECISION)
    mixing = _dot(x, tl.trans(h), PRECISION) * tl.load(read_steps + layer * CHUNK * CHUNK + square)
    out -= _dot(mixing, d, PRECISION)
    w += w * tl.load(end_weights + layer) + s * tl.load(end_momentum + layer)
    written = d * tl.load(end_steps + layer * CHUNK + step)[:, None]
    w -= _dot(tl.trans(written), h, PRECISION)
    written = d * tl.load(momentum_steps + layer * CHUNK + step)[:, None]
    s = s * tl.load(momentum_momentum + layer) - _dot(tl.trans(written), h, PRECISION)
    tl.store(moments_after + tile, s)
    return out, w


@triton.jit(do_not_specialize=["num_chunks"])
def forward_kernel(
    queries, keys, values,
    read_weights, read_momentum, read_steps, end_weights, end_momentum, end_steps, momentum_momentum,
    momentum_steps,
    base1, base2,
    weights1, weights2, moments1, moments2,
    reads, surprise,
    kept_weights1, kept_weights2, kept_moments1, kept_moments2,
    tape_outputs, tape_above, tape_delta, tape_read, scales1, scales2,
    num_chunks, num_rows, group,
    FLOOR: tl.constexpr, RADIUS: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr,
    HAS_BASE: tl.constexpr, RESIDUAL: tl.constexpr, NORMALIZE: tl.constexpr, RESCALE: tl.constexpr,
    GELU: tl.constexpr, TAPE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunks in sequence.

    The state is read from `weights1` … `moments2`. Without TAPE every chunk overwrites it. With TAPE there is
    one for each chunk and one more, a chunk writes where the next one reads, and what the backward needs is
    written too. KEEP: copy the state before every `group` chunks to `kept_…`.
    """
    row = tl.program_id(0).to(tl.int64)
    up, down = _tile(HIDDEN, DIM), _tile(DIM, HIDDEN)
    size = HIDDEN * DIM
    token, wide, step = _tile(CHUNK, DIM), _tile(CHUNK, HIDDEN), tl.arange(0, CHUNK)
    base1 += row * size
    base2 += row * size

    before = row * size
    w1 = tl.load(weights1 + before + up)
    w2 = tl.load(weights2 + before + down)
    for n in range(num_chunks):
        here = n * num_rows + row
        layer1 = 2 * n * num_rows + row
        if KEEP and n % group == 0:
            at = ((n // group) * num_rows + row) * size
            tl.store(kept_weights1 + at + up, w1)
            tl.store(kept_weights2 + at + down, w2)
            tl.store(kept_moments1 + at + up, tl.load(moments1 + before + up))
            tl.store(kept_moments2 + at + down, tl.load(moments2 + before + down))
        after = before
        if TAPE:
            after += num_rows * size

        # Surprise at the anchor.
        k = tl.load(keys + here * CHUNK * DIM + token)
        total1 = w1
        if HAS_BASE:
            total1 += tl.load(base1 + up)
        outputs = _dot(k, tl.trans(total1), PRECISION)
        hidden = _activation(outputs, GELU)
        total2 = w2
        if HAS_BASE:
            total2 += tl.load(base2 + down)
        error = _dot(hidden, tl.trans(total2), PRECISION) - tl.load(values + here * CHUNK * DIM + token)
        if RESIDUAL:
            error += k
        tl.store(surprise + here * CHUNK + step, tl.sum(error * error, 1))
        d2 = 2 * error
        above = _dot(d2, total2, PRECISION)
        d1 = above * _slope(outputs, GELU)
        if TAPE:
            tl.store(tape_outputs + here * CHUNK * HIDDEN + wide, outputs)
            tl.store(tape_above + here * CHUNK * HIDDEN + wide, above)
            tl.store(tape_delta + here * CHUNK * DIM + token, d2)
        if NORMALIZE:
            d1 /= _normalizer(tl.sum(k * k, 1), 2 * _kappa(tl.sum(total2 * total2, 1), FLOOR), FLOOR, 2)[
                :, None
            ]
            d2 /= _normalizer(tl.sum(hidden * hidden, 1), 2.0, FLOOR, 2)[:, None]

        q = tl.load(queries + here * CHUNK * DIM + token)
        out, w1 = _layer_forward(
            q, k, d1, w1, layer1, moments1 + before, moments1 + after, base1,
            read_weights, read_momentum, read_steps, end_weights, end_momentum, end_steps, momentum_momentum,
            momentum_steps,
            CHUNK, HIDDEN, DIM, HAS_BASE, PRECISION,
        )  # fmt: skip
        if TAPE:
            tl.store(tape_read + here * CHUNK * HIDDEN + wide, out)
        r = _activation(out, GELU)
        out, w2 = _layer_forward(
            r, hidden, d2, w2, layer1 + num_rows, moments2 + before, moments2 + after, base2,
            read_weights, read_momentum, read_steps, end_weights, end_momentum, end_steps, momentum_momentum,
            momentum_steps,
            CHUNK, DIM, HIDDEN, HAS_BASE, PRECISION,
        )  # fmt: skip
        if RESIDUAL:
            out += q
        tl.store(reads + here * CHUNK * DIM + token, out)

        if RESCALE:
            w1, scale1 = _settle(w1, RADIUS)
            w2, scale2 = _settle(w2, RADIUS)
            if TAPE:
                tl.store(scales1 + here * HIDDEN + tl.arange(0, HIDDEN), scale1)
                tl.store(scales2 + here * DIM + tl.arange(0, DIM), scale2)
        if TAPE:
            tl.store(weights1 + after + up, w1)
            tl.store(weights2 + after + down, w2)
        before = after
        # What one thread has written of the momentum another may read next.
        tl.debug_barrier()
    if not TAPE:
        tl.store(weights1 + before + up, w1)
        tl.store(weights2 + before + down, w2)


@triton.jit
def _layer_backward(
    x, h, d, grad, layer,
    weights, weights_after, moments, base, scales,
    grad_weight, grad_moment, grad_base,
    read_weights, read_momentum, read_steps, end_weights, end_momentum, end_steps, momentum_momentum,
    momentum_steps,
    grad_read_weights, grad_read_momentum, grad_read_steps, grad_end_weights, grad_end_momentum,
    grad_end_steps, grad_momentum_momentum, grad_momentum_steps,
    RADIUS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_BASE: tl.constexpr, RESCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_layer_forward` in reverse: from the gradient of what was read to those of x, h and d.

    The gradients of the state the layer has left are in memory, and those of the state it began with take
    their place; the gradients of base and coefficients go to memory too.
    """
    tile, square, step = _tile(ROWS, COLUMNS), _tile(CHUNK, CHUNK), tl.arange(0, CHUNK)
    weigh = tl.load(read_weights + layer * CHUNK + step)[:, None]
    carry = tl.load(read_momentum + layer * CHUNK + step)[:, None]
    mix = tl.load(read_steps + layer * CHUNK * CHUNK + square)
    end = tl.load(end_steps + layer * CHUNK + step)[:, None]
    past = tl.load(momentum_steps + layer * CHUNK + step)[:, None]
    mixing = -_dot(grad, tl.trans(d), PRECISION)
    similarity = _dot(x, tl.trans(h), PRECISION)
    tl.store(grad_read_steps + layer * CHUNK * CHUNK + square, mixing * similarity)
    mixing *= mix
    gd = -_dot(tl.trans(similarity * mix), grad, PRECISION)
    gh = _dot(tl.trans(mixing), x, PRECISION)
    gx = _dot(mixing, h, PRECISION)
    if HAS_BASE:
        gx += _dot(grad, tl.load(base + tile), PRECISION)
        into = grad_base + tile
        tl.store(into, tl.load(into) + _dot(tl.trans(grad), x, PRECISION))

    gw = tl.load(grad_weight + tile)
    if RESCALE:
        scale = tl.load(scales + tl.arange(0, ROWS))
        gw = _unsettle(tl.load(weights_after + tile), scale, gw, RADIUS)
    deposit = _dot(h, tl.trans(gw), PRECISION)
    tl.store(grad_end_steps + layer * CHUNK + step, -tl.sum(d * deposit, 1))
    gd -= deposit * end
    gh -= _dot(d * end, gw, PRECISION)
    w = tl.load(weights + tile)
    through = _dot(grad, w, PRECISION)
    tl.store(grad_read_weights + layer * CHUNK + step, tl.sum(x * through, 1))
    gx += through * weigh
    tl.store(grad_end_weights + layer, tl.sum(tl.sum(gw * w, 1), 0))
    s = tl.load(moments + tile)
    through = _dot(grad, s, PRECISION)
    tl.store(grad_read_momentum + layer * CHUNK + step, tl.sum(x * through, 1))
    gx += through * carry
    tl.store(grad_end_momentum + layer, tl.sum(tl.sum(gw * s, 1), 0))
    gs = tl.load(grad_moment + tile)
    deposit = _dot(h, tl.trans(gs), PRECISION)
    tl.store(grad_momentum_steps + layer * CHUNK + step, -tl.sum(d * deposit, 1))
    gd -= deposit * past
    gh -= _dot(d * past, gs, PRECISION)
    tl.store(grad_momentum_momentum + layer, tl.sum(tl.sum(gs * s, 1), 0))
    gs = gs * tl.load(momentum_momentum + layer) + gw * tl.load(end_momentum + layer)
    tl.store(grad_moment + tile, gs + _dot(tl.trans(grad * carry), x, PRECISION))
    gw += gw * tl.load(end_weights + layer)
    tl.store(grad_weight + tile, gw + _dot(tl.trans(grad * weigh), x, PRECISION))
    return gx, gh, gd


@triton.jit(do_not_specialize=["num_chunks"])
def backward_kernel(
    queries, keys,
    read_weights, read_momentum, read_steps, end_weights, end_momentum, end_steps, momentum_momentum,
    momentum_steps,
    base1, base2,
    weights1, weights2, moments1, moments2,
    tape_outputs, tape_above, tape_delta, tape_read, scales1, scales2,
    grad_reads,
    grad_weight1, grad_weight2, grad_moment1, grad_moment2, grad_base1, grad_base2,
    grad_queries, grad_keys, grad_values,
    grad_read_weights, grad_read_momentum, grad_read_steps, grad_end_weights, grad_end_momentum,
    grad_end_steps, grad_momentum_momentum, grad_momentum_steps,
    num_chunks, num_rows,
    FLOOR: tl.constexpr, RADIUS: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr,
    HAS_BASE: tl.constexpr, RESIDUAL: tl.constexpr, NORMALIZE: tl.constexpr, RESCALE: tl.constexpr,
    GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunks in reverse, from the tape.

    The gradients of the state and of the base are carried in memory, in place: they are read again while they
    are still in the second-level cache, and registers hold one at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    up, down = _tile(HIDDEN, DIM), _tile(DIM, HIDDEN)
    size = HIDDEN * DIM
    token, wide = _tile(CHUNK, DIM), _tile(CHUNK, HIDDEN)
    base1 += row * size
    base2 += row * size
    grad_weight1 += row * size
    grad_weight2 += row * size
    grad_moment1 += row * size
    grad_moment2 += row * size
    grad_base1 += row * size
    grad_base2 += row * size

    for back in range(num_chunks):
        n = num_chunks - 1 - back
        here = n * num_rows + row
        layer1 = 2 * n * num_rows + row
        state = here * size
        after = state + num_rows * size

        # Back from the reads and from the weights that were left.
        hidden = _activation(tl.load(tape_outputs + here * CHUNK * HIDDEN + wide), GELU)
        d2 = tl.load(tape_delta + here * CHUNK * DIM + token)
        if NORMALIZE:
            d2 /= _normalizer(tl.sum(hidden * hidden, 1), 2.0, FLOOR, 2)[:, None]
        r = _activation(tl.load(tape_read + here * CHUNK * HIDDEN + wide), GELU)
        go = tl.load(grad_reads + here * CHUNK * DIM + token)
        gr, gh, gd2 = _layer_backward(
            r, hidden, d2, go, layer1 + num_rows,
            weights2 + state, weights2 + after, moments2 + state, base2, scales2 + here * DIM,
            grad_weight2, grad_moment2, grad_base2,
            read_weights, read_momentum, read_steps, end_weights, end_momentum, end_steps, momentum_momentum,
            momentum_steps,
            grad_read_weights, grad_read_momentum, grad_read_steps, grad_end_weights, grad_end_momentum,
            grad_end_steps, grad_momentum_momentum, grad_momentum_steps,
            RADIUS, CHUNK, DIM, HIDDEN, HAS_BASE, RESCALE, PRECISION,
        )  # fmt: skip

        k = tl.load(keys + here * CHUNK * DIM + token)
        total2 = tl.load(weights2 + state + down)
        if HAS_BASE:
            total2 += tl.load(base2 + down)
        d1 = tl.load(tape_above + here * CHUNK * HIDDEN + wide)
        d1 *= _slope(tl.load(tape_outputs + here * CHUNK * HIDDEN + wide), GELU)
        if NORMALIZE:
            kappa = 2 * _kappa(tl.sum(total2 * total2, 1), FLOOR)
            d1 /= _normalizer(tl.sum(k * k, 1), kappa, FLOOR, 2)[:, None]
        g1 = gr * _slope(tl.load(tape_read + here * CHUNK * HIDDEN + wide), GELU)
        q = tl.load(queries + here * CHUNK * DIM + token)
        gq, gk, gd1 = _layer_backward(
            q, k, d1, g1, layer1,
            weights1 + state, weights1 + after, moments1 + state, base1, scales1 + here * HIDDEN,
            grad_weight1, grad_moment1, grad_base1,
            read_weights, read_momentum, read_steps, end_weights, end_momentum, end_steps, momentum_momentum,
            momentum_steps,
            grad_read_weights, grad_read_momentum, grad_read_steps, grad_end_weights, grad_end_momentum,
            grad_end_steps, grad_momentum_momentum, grad_momentum_steps,
            RADIUS, CHUNK, HIDDEN, DIM, HAS_BASE, RESCALE, PRECISION,
        )  # fmt: skip
        if RESIDUAL:
            gq += go
        tl.store(grad_queries + here * CHUNK * DIM + token, gq)

        # Through the inner backward pass, and the inner forward pass: what is found at the anchor.
        outputs = tl.load(tape_outputs + here * CHUNK * HIDDEN + wide)
        total2 = tl.load(weights2 + state + down)
        if HAS_BASE:
            total2 += tl.load(base2 + down)
        gt = total2 * 0
        if NORMALIZE:
            key_square, hidden_square = tl.sum(k * k, 1), tl.sum(hidden * hidden, 1)
            gd1 /= _normalizer(key_square, kappa, FLOOR, 2)[:, None]
            gd2 /= _normalizer(hidden_square, 2.0, FLOOR, 2)[:, None]
            gsquare, gkappa = _normalizer_slopes(key_square, kappa, FLOOR, -tl.sum(gd1 * d1, 1))
            gk += 2 * k * gsquare[:, None]
            gt += total2 * (4 * 1.2769 * gkappa)
            gsquare, _ = _normalizer_slopes(hidden_square, 2.0, FLOOR, -tl.sum(gd2 * d2, 1))
            gh += 2 * hidden * gsquare[:, None]
        slope = _slope(outputs, GELU)
        ga = gd1 * slope
        gd2 += _dot(ga, tl.trans(total2), PRECISION)
        gf = 2 * gd2
        tl.store(grad_values + here * CHUNK * DIM + token, -gf)
        if RESIDUAL:
            gk += gf
        gh += _dot(gf, total2, PRECISION)
        gt += _dot(tl.trans(tl.load(tape_delta + here * CHUNK * DIM + token)), ga, PRECISION)
        gt += _dot(tl.trans(gf), hidden, PRECISION)
        into = grad_weight2 + down
        tl.store(into, tl.load(into) + gt)
        if HAS_BASE:
            into = grad_base2 + down
            tl.store(into, tl.load(into) + gt)
        gz = gh * slope
        gz += gd1 * tl.load(tape_above + here * CHUNK * HIDDEN + wide) * _bend(outputs, GELU)
        gt = _dot(tl.trans(gz), k, PRECISION)
        into = grad_weight1 + up
        tl.store(into, tl.load(into) + gt)
        if HAS_BASE:
            into = grad_base1 + up
            tl.store(into, tl.load(into) + gt)
        total1 = tl.load(weights1 + state + up)
        if HAS_BASE:
            total1 += tl.load(base1 + up)
        gk += _dot(gz, total1, PRECISION)
        tl.store(grad_keys + here * CHUNK * DIM + token, gk)
        # What one thread has written of these gradients another may read next.
        tl.debug_barrier()
