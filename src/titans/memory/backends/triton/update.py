"""How a chunk updates a tile of weights and its momentum, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl

from titans.memory.backends.triton.elementary import _dot


@triton.jit
def _outer(d, h, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """Σ of the tokens' outer products d hᵀ. TURNED: where h is the narrower one (see `block_of`)."""
    if TURNED:
        return tl.trans(_dot(tl.trans(h), d, PRECISION))
    else:
        return _dot(tl.trans(d), h, PRECISION)


@triton.jit
def _moved(
    w, s, d, h, layer,
    end_weights, end_momentum, end_steps, momentum_momentum, momentum_steps,
    CHUNK: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of weights and its momentum after the chunk. d: (CHUNK, its rows). h: (CHUNK, its columns)."""
    step = layer * CHUNK + tl.arange(0, CHUNK)
    written = _outer(d * tl.load(end_steps + step)[:, None], h, TURNED, PRECISION)
    # In this order: where all is forgotten, nothing is left to round.
    w += w * tl.load(end_weights + layer) + s * tl.load(end_momentum + layer)
    w -= written
    written = _outer(d * tl.load(momentum_steps + step)[:, None], h, TURNED, PRECISION)
    return w, s * tl.load(momentum_momentum + layer) - written


@triton.jit
def _add(into, grad):
    tl.store(into, tl.load(into) + grad)


@triton.jit
def _moved_backward(
    x, h, d, g, gw, gx, gh, gd, by_weigh, by_carry, by_end, by_past, by_kept, by_moved, by_carried, layer,
    read_weights, read_momentum, end_weights, end_momentum, end_steps, momentum_momentum, momentum_steps,
    weights, moments, grad_weights, grad_moments,
    CHUNK: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Back through a tile of weights that x has read and that moved by d hᵀ (`_moved`), gradients in memory.

    x, h: (CHUNK, its columns). d, g: (CHUNK, its rows), g the gradient of what was read. gw: of the tile the
    chunk has left. gx, gh, gd and by_…: what is added to, the gradients of x, h, d and the coefficients.
    """
    step = layer * CHUNK + tl.arange(0, CHUNK)
    weigh, carry = tl.load(read_weights + step)[:, None], tl.load(read_momentum + step)[:, None]
    end, past = tl.load(end_steps + step)[:, None], tl.load(momentum_steps + step)[:, None]
    deposit = _dot(h, tl.trans(gw), PRECISION)
    by_end -= tl.sum(d * deposit, 1)
    gd -= deposit * end
    gh -= _dot(d, gw, PRECISION) * end
    w = tl.load(weights)
    through = _dot(g, w, PRECISION)
    by_weigh += tl.sum(x * through, 1)
    gx += through * weigh
    by_kept += tl.sum(gw * w, 1)
    s = tl.load(moments)
    through = _dot(g, s, PRECISION)
    by_carry += tl.sum(x * through, 1)
    gx += through * carry
    by_moved += tl.sum(gw * s, 1)
    gs = tl.load(grad_moments)
    deposit = _dot(h, tl.trans(gs), PRECISION)
    by_past -= tl.sum(d * deposit, 1)
    gd -= deposit * past
    gh -= _dot(d, gs, PRECISION) * past
    by_carried += tl.sum(gs * s, 1)
    gs = gs * tl.load(momentum_momentum + layer) + gw * tl.load(end_momentum + layer)
    tl.store(grad_moments, gs + _outer(g * carry, x, TURNED, PRECISION))
    gw += gw * tl.load(end_weights + layer)
    tl.store(grad_weights, gw + _outer(g * weigh, x, TURNED, PRECISION))
    return gx, gh, gd, by_weigh, by_carry, by_end, by_past, by_kept, by_moved, by_carried
