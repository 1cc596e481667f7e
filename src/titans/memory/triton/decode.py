"""One token at a time, without a gradient: one program for each head of each row reads, learns and answers.

The equations are those of `reference.py`, with the names of `kernels.py`. A product with one token is a sum
over a tile, and of weights there is a tile of each kind in registers, however wide the memory. Whether a
token ends its chunk is for the device to find out: the host waits for nothing, so that a step of decoding can
be recorded as a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans.memory.problem import ScanProblem
from titans.memory.state import MemoryState, map_state
from titans.memory.triton.elementary import (
    _activation,
    _kappa,
    _normalizer,
    _row_scale,
    _slope,
    _tile,
    _with_base,
)

# Numbers in a tile of weights. Twice as many spill, with so many pointers to hold.
TILE = 2048
_WARPS = 8


@triton.jit
def _gates(forget, momentum, step_size, at, real):
    """Of one layer; a masked token, all of whose numbers are 0, keeps everything (and see `_learn`)."""
    alpha = tl.load(forget + at, real, 0.0)
    eta = tl.load(momentum + at, real, 1.0)
    theta = tl.load(step_size + at, real, 0.0)
    return alpha, eta, theta


@triton.jit
def _learn(d, h, real, alpha, eta, theta, weights, moments, new_moments):
    """A tile of weights after a token has been written; the momentum goes from memory to memory.

    d, h: the token's gradient is their outer product. The pointers are those of the tile.
    """
    s = eta * tl.load(moments) - (theta * d)[:, None] * h[None, :]
    tl.store(new_moments, s)
    w = tl.load(weights)
    # Not (1 − alpha) w, which in float32 loses the alpha of a slow gate. Momentum moves the weights whatever
    # the gates, so with a masked token it is not added.
    return (w - alpha * w) + tl.where(real, s, 0.0)


@triton.jit
def one_layer_kernel(
    queries, keys, values, forget, momentum, step_size, mask, position,
    base1, weights1, moments1, anchor1,
    reads, surprise, new_position, new_weights1, new_moments1, new_anchor1,
    time, heads, chunk_size,
    FLOOR: tl.constexpr, RADIUS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_BASE: tl.constexpr, RESIDUAL: tl.constexpr, NORMALIZE: tl.constexpr, RESCALE: tl.constexpr,
):  # fmt: skip
    """A linear memory: what a token finds, writes and reads of a row of weights is of that row alone."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    size, dim, rows, tile = DIM * DIM, tl.arange(0, DIM), tl.arange(0, BLOCK), _tile(BLOCK, DIM)
    base1 += head * size
    weights1 += row * size
    moments1 += row * size
    anchor1 += row * size
    new_weights1 += row * size
    new_moments1 += row * size
    new_anchor1 += row * size
    place = tl.load(position + batch)
    for t in range(time):
        token = (batch * time + t) * heads + head
        real = True
        if HAS_MASK:
            real = tl.load(mask + batch * time + t) != 0
        alpha, eta, theta = _gates(forget, momentum, step_size, token, real)
        k = tl.load(keys + token * DIM + dim, real, 0.0)
        q = tl.load(queries + token * DIM + dim, real, 0.0)
        place += tl.where(real, 1, 0)
        ends = (place % chunk_size == 0) & real
        if NORMALIZE:
            theta /= _normalizer(tl.sum(k * k, 0), 2.0, FLOOR, 1)
        lost = tl.zeros([BLOCK], k.dtype)
        for begin in range(0, DIM, BLOCK):
            at = begin * DIM + tile
            part = token * DIM + begin + rows
            total = _with_base(tl.load(anchor1 + at), base1 + at, HAS_BASE)
            error = tl.sum(total * k[None, :], 1) - tl.load(values + part, real, 0.0)
            if RESIDUAL:
                error += tl.load(keys + part, real, 0.0)
            lost += error * error
            w = _learn(2 * error, k, real, alpha, eta, theta, weights1 + at, moments1 + at, new_moments1 + at)
            out = tl.sum(_with_base(w, base1 + at, HAS_BASE) * q[None, :], 1)
            if RESIDUAL:
                out += tl.load(queries + part, real, 0.0)
            tl.store(reads + part, out)
            if RESCALE:
                scale, _ = _row_scale(tl.sum(w * w, 1), RADIUS, False)
                w = tl.where(ends, w * scale[:, None], w)
            tl.store(new_weights1 + at, w)
            tl.store(new_anchor1 + at, tl.where(ends, w, tl.load(anchor1 + at)))
        tl.store(surprise + token, tl.sum(lost, 0))
        weights1, moments1, anchor1 = new_weights1, new_moments1, new_anchor1
        # What one thread has written of the state another may read next.
        tl.debug_barrier()
    if head == 0:
        tl.store(new_position + batch, place)


@triton.jit
def two_layers_kernel(
    queries, keys, values, forget, momentum, step_size, mask, position,
    base1, base2, weights1, weights2, moments1, moments2, anchor1, anchor2,
    reads, surprise, new_position, new_weights1, new_weights2, new_moments1, new_moments2, new_anchor1,
    new_anchor2,
    time, heads, chunk_size,
    FLOOR: tl.constexpr, RADIUS: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BASE: tl.constexpr, RESIDUAL: tl.constexpr, NORMALIZE: tl.constexpr,
    RESCALE: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """Two passes over the hidden units, BLOCK at a time: rows of W_1 and columns of W_2.

    The first asks the anchor for the token's value; the second, knowing the error, writes and reads each unit
    once. Where a chunk ends, rows of W_2 are whole only after it.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    size, dim = HIDDEN * DIM, tl.arange(0, DIM)
    up, down = _tile(BLOCK, DIM), dim[:, None] * HIDDEN + tl.arange(0, BLOCK)[None, :]
    base1 += head * size
    base2 += head * size
    weights1 += row * size
    weights2 += row * size
    moments1 += row * size
    moments2 += row * size
    anchor1 += row * size
    anchor2 += row * size
    new_weights1 += row * size
    new_weights2 += row * size
    new_moments1 += row * size
    new_moments2 += row * size
    new_anchor1 += row * size
    new_anchor2 += row * size
    place = tl.load(position + batch)
    for t in range(time):
        token = (batch * time + t) * heads + head
        real = True
        if HAS_MASK:
            real = tl.load(mask + batch * time + t) != 0
        alpha1, eta1, theta1 = _gates(forget, momentum, step_size, 2 * token, real)
        alpha2, eta2, theta2 = _gates(forget, momentum, step_size, 2 * token + 1, real)
        k = tl.load(keys + token * DIM + dim, real, 0.0)
        place += tl.where(real, 1, 0)
        ends = (place % chunk_size == 0) & real

        # Surprise at the anchor.
        error = tl.zeros([DIM], k.dtype)
        squares = tl.zeros([DIM], k.dtype)
        hidden_squares = tl.zeros([BLOCK], k.dtype)
        for begin in range(0, HIDDEN, BLOCK):
            wide, tall = begin * DIM + up, begin + down
            total1 = _with_base(tl.load(anchor1 + wide), base1 + wide, HAS_BASE)
            hidden = _activation(tl.sum(total1 * k[None, :], 1), GELU)
            total2 = _with_base(tl.load(anchor2 + tall), base2 + tall, HAS_BASE)
            error += tl.sum(total2 * hidden[None, :], 1)
            if NORMALIZE:
                squares += tl.sum(total2 * total2, 1)
                hidden_squares += hidden * hidden
        error -= tl.load(values + token * DIM + dim, real, 0.0)
        if RESIDUAL:
            error += k
        tl.store(surprise + token, tl.sum(error * error, 0))
        d2 = 2 * error
        if NORMALIZE:
            theta1 /= _normalizer(tl.sum(k * k, 0), 2 * _kappa(squares, FLOOR), FLOOR, 2)
            theta2 /= _normalizer(tl.sum(hidden_squares, 0), 2.0, FLOOR, 2)

        q = tl.load(queries + token * DIM + dim, real, 0.0)
        out = tl.zeros([DIM], k.dtype)
        squares = tl.zeros([DIM], k.dtype)
        for begin in range(0, HIDDEN, BLOCK):
            wide, tall = begin * DIM + up, begin + down
            total1 = _with_base(tl.load(anchor1 + wide), base1 + wide, HAS_BASE)
            outputs = tl.sum(total1 * k[None, :], 1)
            total2 = _with_base(tl.load(anchor2 + tall), base2 + tall, HAS_BASE)
            d1 = tl.sum(total2 * d2[:, None], 0) * _slope(outputs, GELU)
            w1 = _learn(
                d1, k, real, alpha1, eta1, theta1, weights1 + wide, moments1 + wide, new_moments1 + wide
            )
            read = _activation(tl.sum(_with_base(w1, base1 + wide, HAS_BASE) * q[None, :], 1), GELU)
            if RESCALE:
                scale, _ = _row_scale(tl.sum(w1 * w1, 1), RADIUS, False)
                w1 = tl.where(ends, w1 * scale[:, None], w1)
            tl.store(new_weights1 + wide, w1)
            tl.store(new_anchor1 + wide, tl.where(ends, w1, tl.load(anchor1 + wide)))

            hidden = _activation(outputs, GELU)
            w2 = _learn(
                d2, hidden, real, alpha2, eta2, theta2, weights2 + tall, moments2 + tall, new_moments2 + tall
            )
            out += tl.sum(_with_base(w2, base2 + tall, HAS_BASE) * read[None, :], 1)
            if RESCALE:
                squares += tl.sum(w2 * w2, 1)
            tl.store(new_weights2 + tall, w2)
            tl.store(new_anchor2 + tall, tl.where(ends, w2, tl.load(anchor2 + tall)))
        if RESIDUAL:
            out += q
        tl.store(reads + token * DIM + dim, out)
        if RESCALE:  # noqa: SIM102
            if ends:
                scale, _ = _row_scale(squares, RADIUS, False)
                tl.debug_barrier()
                for begin in range(0, HIDDEN, BLOCK):
                    tall = begin + down
                    w2 = tl.load(new_weights2 + tall) * scale[:, None]
                    tl.store(new_weights2 + tall, w2)
                    tl.store(new_anchor2 + tall, w2)
        weights1, moments1, anchor1 = new_weights1, new_moments1, new_anchor1
        weights2, moments2, anchor2 = new_weights2, new_moments2, new_anchor2
        # What one thread has written of the state another may read next.
        tl.debug_barrier()
    if head == 0:
        tl.store(new_position + batch, place)


def decode(problem: ScanProblem) -> tuple[Tensor, MemoryState, Tensor]:
    """Reads (batch, time, heads, head_dim), new state, and surprise (batch, time, heads) of every token."""
    net, keys = problem.net, problem.keys
    batch, time, heads, dim = keys.shape
    state = map_state(Tensor.contiguous, problem.state)
    tokens = (problem.queries, keys, problem.values, problem.forget, problem.momentum, problem.step_size)
    parts = (*state.weights, *state.momentum, *state.anchor)
    # Whether anchor and weights have become one only the device knows, so they are two.
    new = [torch.empty_like(x) for x in parts]
    reads, surprise, unused = keys.new_empty(keys.shape), keys.new_empty(keys.shape[:3]), keys.new_empty(1)
    position = torch.empty_like(state.position)
    mask = unused if problem.mask is None else problem.mask.contiguous().view(torch.uint8)
    base = [unused] * net.depth if problem.base is None else [x.contiguous() for x in problem.base]
    kernel, units, more = one_layer_kernel, dim, {}
    if net.depth == 2:
        kernel, units = two_layers_kernel, net.expansion * dim
        more = dict(HIDDEN=units, GELU=net.activation == "gelu")
    launch: Any = kernel[(batch * heads,)]
    launch(
        *(x.contiguous() for x in tokens), mask, state.position, *base, *parts,
        reads, surprise, position, *new,
        time, heads, problem.chunk_size,
        FLOOR=net.length_floor**2,
        RADIUS=net._radius,
        DIM=dim,
        BLOCK=min(TILE // dim, units),
        HAS_MASK=problem.mask is not None,
        HAS_BASE=problem.base is not None,
        RESIDUAL=net.residual,
        NORMALIZE=net.normalize_step,
        RESCALE=net._rescales,
        **more,
        num_warps=_WARPS,
        num_stages=1,
    )  # fmt: skip
    weights, momentum, anchor = (tuple(new[i : i + net.depth]) for i in range(0, len(new), net.depth))
    return reads, MemoryState(weights, momentum, anchor, position), surprise
