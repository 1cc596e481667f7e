"""One token at a time, without a gradient: one program for each head of each row reads, learns and answers.

The equations are those of `reference.py`, with the names of `forward.py`. A product with one token is a sum
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

from titans.memory.backends.triton.constants import inner_constants
from titans.memory.backends.triton.elementary import (
    _activation,
    _kappa,
    _normalizer,
    _normed,
    _row_scale,
    _slope,
    _tile,
    _with_base,
)
from titans.memory.backends.triton.objective import _curvature, _loss, _objective
from titans.memory.problem import ScanProblem
from titans.memory.state import MemoryState
from titans.state import map_state

# Numbers in a tile of weights. Twice as many spill (at 64 × 256), with so many pointers to hold.
TILE = 2048
_WARPS = 8


@triton.jit
def _learn(d, h, real, forget, momentum, step_size, weights, moments, new_moments):
    """A tile of weights after a token has been written; the momentum goes from memory to memory.

    d, h: the token's gradient is their outer product. The pointers are those of the tile. A masked token, all
    of whose numbers are 0, keeps everything.
    """
    s = momentum * tl.load(moments) - (step_size * d)[:, None] * h[None, :]
    tl.store(new_moments, s)
    w = tl.load(weights)
    # Not (1 − forget) w, which in float32 loses the alpha of a slow gate. Momentum moves the weights whatever
    # the gates, so with a masked token it is not added.
    return (w - forget * w) + tl.where(real, s, 0.0)


@triton.jit
def decode_kernel(
    queries, keys, values, forget, momentum, step_size, mask, reset, gain, bias, position,
    base_up, base_down, initial_up, initial_down, initial_moments_up, initial_moments_down,
    weights_up, weights_down, moments_up, moments_down, anchor_up, anchor_down,
    reads, surprise, new_position, new_weights_up, new_weights_down, new_moments_up, new_moments_down,
    new_anchor_up, new_anchor_down,
    time, heads, chunk_size,
    EPS: tl.constexpr, FLOOR: tl.constexpr, RADIUS: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, HAS_MASK: tl.constexpr, HAS_RESET: tl.constexpr,
    HAS_BASE: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, NORMALIZE: tl.constexpr,
    RESCALE: tl.constexpr, ACTIVATION: tl.constexpr, OBJECTIVE: tl.constexpr, PARAMETER: tl.constexpr,
):  # fmt: skip
    """Two passes over the hidden units, BLOCK at a time: rows of W_up and columns of W_down.

    The first asks the anchor for the token's value; the second, knowing the error, writes and reads each unit
    once. Where a chunk ends, rows of W_down are whole only after it. A linear memory is a W_down alone.
    """
    dtype: tl.constexpr = values.dtype.element_ty
    # Of keys and queries, which are the hidden units of a linear memory.
    width: tl.constexpr = HIDDEN if DEPTH == 1 else DIM
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    size, dim, unit = HIDDEN * DIM, tl.arange(0, DIM), tl.arange(0, BLOCK)
    up, down = _tile(BLOCK, DIM), dim[:, None] * HIDDEN + unit[None, :]
    base_down += head * size
    initial_down += head * size
    initial_moments_down += head * size
    weights_down += row * size
    moments_down += row * size
    anchor_down += row * size
    new_weights_down += row * size
    new_moments_down += row * size
    new_anchor_down += row * size
    if DEPTH == 2:
        base_up += head * size
        initial_up += head * size
        initial_moments_up += head * size
        weights_up += row * size
        moments_up += row * size
        anchor_up += row * size
        new_weights_up += row * size
        new_moments_up += row * size
        new_anchor_up += row * size
    shift, offset = tl.zeros([DIM], tl.float32), tl.zeros([DIM], tl.float32)
    if NORM:
        shift, offset = tl.load(gain + head * DIM + dim), tl.load(bias + head * DIM + dim)
    place = tl.load(position + batch)
    for t in range(time):
        if HAS_RESET:  # noqa: SIM102
            if tl.load(reset + batch * time + t) != 0:
                place = place * 0
                weights_down, moments_down, anchor_down = initial_down, initial_moments_down, initial_down
                if DEPTH == 2:
                    weights_up, moments_up, anchor_up = initial_up, initial_moments_up, initial_up
        token = (batch * time + t) * heads + head
        real = True
        if HAS_MASK:
            real = tl.load(mask + batch * time + t) != 0
        gate = DEPTH * token + DEPTH - 1
        theta_down = tl.load(step_size + gate, real, 0.0)
        k = tl.zeros([DIM], dtype)
        if DEPTH == 2 or RESIDUAL:
            k = tl.load(keys + token * width + dim, real, 0.0)
        place += tl.where(real, 1, 0)
        ends = (place % chunk_size == 0) & real

        # Surprise at the anchor.
        features = tl.zeros([DIM], dtype)
        squares = tl.zeros([DIM], dtype)
        hidden_squares = tl.zeros([BLOCK], dtype)
        for begin in range(0, HIDDEN, BLOCK):
            if DEPTH == 2:
                at = begin * DIM + up
                total = _with_base(tl.load(anchor_up + at), base_up + at, HAS_BASE)
                hidden = _activation(tl.sum(total * k[None, :], 1), ACTIVATION)
            else:
                hidden = tl.load(keys + token * width + begin + unit, real, 0.0)
            at = begin + down
            total = _with_base(tl.load(anchor_down + at), base_down + at, HAS_BASE)
            features += tl.sum(total * hidden[None, :], 1)
            if NORMALIZE:
                squares += tl.sum(total * total, 1)
                hidden_squares += hidden * hidden
        v = tl.load(values + token * DIM + dim, real, 0.0)
        error, delta, normed, scale = _objective(
            features[None, :],
            k[None, :],
            v[None, :],
            shift,
            offset,
            EPS,
            NORM,
            RESIDUAL,
            OBJECTIVE,
            PARAMETER,
        )
        loss = tl.sum(tl.sum(_loss(error, OBJECTIVE, PARAMETER), 1), 0)
        tl.store(surprise + token, tl.where(real, loss, 0.0))
        d_down = tl.sum(delta, 0)
        if DEPTH == 2:
            theta_up = tl.load(step_size + gate - 1, real, 0.0)
        if NORMALIZE:
            factor = tl.sum(tl.zeros([1], dtype) + _curvature(error, OBJECTIVE, PARAMETER), 0)
            if NORM:
                steepest = tl.max(tl.abs(shift), 0) * tl.sum(scale, 0)
                factor *= steepest * steepest
            theta_down /= _normalizer(tl.sum(hidden_squares, 0), factor, FLOOR, DEPTH)
            if DEPTH == 2:
                theta_up /= _normalizer(
                    tl.sum(k * k, 0), factor * _kappa(tl.sum(squares, 0), DIM, FLOOR), FLOOR, DEPTH
                )

        alpha_down = tl.load(forget + gate, real, 0.0)
        eta_down = tl.load(momentum + gate, real, 1.0)
        q = k
        if DEPTH == 2 or RESIDUAL:
            q = tl.load(queries + token * width + dim, real, 0.0)
        out = tl.zeros([DIM], dtype)
        squares = tl.zeros([DIM], dtype)
        for begin in range(0, HIDDEN, BLOCK):
            into = begin + down
            if DEPTH == 2:
                alpha_up = tl.load(forget + gate - 1, real, 0.0)
                eta_up = tl.load(momentum + gate - 1, real, 1.0)
                at = begin * DIM + up
                total = _with_base(tl.load(anchor_up + at), base_up + at, HAS_BASE)
                outputs = tl.sum(total * k[None, :], 1)
                total = _with_base(tl.load(anchor_down + into), base_down + into, HAS_BASE)
                d_up = tl.sum(total * d_down[:, None], 0) * _slope(outputs, ACTIVATION)
                w = _learn(
                    d_up, k, real, alpha_up, eta_up, theta_up, weights_up + at, moments_up + at,
                    new_moments_up + at,
                )  # fmt: skip
                read = _activation(tl.sum(_with_base(w, base_up + at, HAS_BASE) * q[None, :], 1), ACTIVATION)
                if RESCALE:
                    factors = _row_scale(tl.sum(w * w, 1), RADIUS)[0]
                    w = tl.where(ends, w * factors[:, None], w)
                tl.store(new_weights_up + at, w)
                tl.store(new_anchor_up + at, tl.where(ends, w, tl.load(anchor_up + at)))
                hidden = _activation(outputs, ACTIVATION)
            else:
                hidden = tl.load(keys + token * width + begin + unit, real, 0.0)
                read = tl.load(queries + token * width + begin + unit, real, 0.0)
            w = _learn(
                d_down, hidden, real, alpha_down, eta_down, theta_down, weights_down + into,
                moments_down + into, new_moments_down + into,
            )  # fmt: skip
            out += tl.sum(_with_base(w, base_down + into, HAS_BASE) * read[None, :], 1)
            if RESCALE:
                squares += tl.sum(w * w, 1)
            tl.store(new_weights_down + into, w)
            tl.store(new_anchor_down + into, tl.where(ends, w, tl.load(anchor_down + into)))
        if NORM:
            normed = tl.sum(_normed(out[None, :], EPS)[0], 0)
            out = tl.where(real, normed * shift + offset, 0.0)
        if RESIDUAL:
            out += q
        tl.store(reads + token * DIM + dim, out)
        if RESCALE:  # noqa: SIM102
            if ends:
                factors = _row_scale(squares, RADIUS)[0]
                tl.debug_barrier()
                for begin in range(0, HIDDEN, BLOCK):
                    into = begin + down
                    w = tl.load(new_weights_down + into) * factors[:, None]
                    tl.store(new_weights_down + into, w)
                    tl.store(new_anchor_down + into, w)
        weights_down, moments_down, anchor_down = new_weights_down, new_moments_down, new_anchor_down
        if DEPTH == 2:
            weights_up, moments_up, anchor_up = new_weights_up, new_moments_up, new_anchor_up
        # What one thread has written of the state another may read next.
        tl.debug_barrier()
    if head == 0:
        tl.store(new_position + batch, place)


def decode(problem: ScanProblem) -> tuple[Tensor, MemoryState, Tensor]:
    """Reads (batch, time, heads, head_dim), new state, and surprise (batch, time, heads) of every token."""
    net, keys = problem.inner.network, problem.keys
    batch, time, heads, _ = keys.shape
    (dim, hidden), unused = net.weight_shapes[-1], keys.new_empty(1)

    def pair(layers: tuple[Tensor, ...] | list[Tensor] | None) -> list[Tensor]:
        """What the kernel calls up and down."""
        there = [] if layers is None else [x.contiguous() for x in layers]
        return [unused] * (2 - len(there)) + there

    def flag(flags: Tensor | None) -> Tensor:
        return unused if flags is None else flags.contiguous().view(torch.uint8)

    def affine(slow: Tensor | None, otherwise: float) -> Tensor:
        if not net.norm:
            return unused
        return keys.new_full((heads, dim), otherwise) if slow is None else slow.contiguous()

    initial, initial_momentum = problem.initial, problem.initial_momentum
    if problem.reset is None:
        initial = initial_momentum = None
    elif initial_momentum is None and initial is not None:
        initial_momentum = tuple(torch.zeros_like(x) for x in initial)
    state = map_state(Tensor.contiguous, problem.state)
    tokens = (problem.queries, keys, problem.values, problem.forget, problem.momentum, problem.step_size)
    # Whether anchor and weights have become one only the device knows, so they are two.
    new = [[torch.empty_like(x) for x in part] for part in (state.weights, state.momentum, state.anchor)]
    reads, surprise = keys.new_empty(batch, time, heads, dim), keys.new_empty(batch, time, heads)
    position = torch.empty_like(state.position)
    launch: Any = decode_kernel[(batch * heads,)]
    launch(
        *(x.contiguous() for x in tokens), flag(problem.mask), flag(problem.reset),
        affine(problem.gain, 1.0), affine(problem.bias, 0.0), state.position,
        *pair(problem.base), *pair(initial), *pair(initial_momentum),
        *pair(state.weights), *pair(state.momentum), *pair(state.anchor),
        reads, surprise, position, *(x for part in new for x in pair(part)),
        time, heads, problem.chunk_size,
        **inner_constants(problem.inner),
        BLOCK=min(TILE // dim, hidden),
        HAS_MASK=problem.mask is not None,
        HAS_RESET=problem.reset is not None,
        HAS_BASE=problem.base is not None,
        num_warps=_WARPS,
        num_stages=1,
    )  # fmt: skip
    weights, momentum, anchor = map(tuple, new)
    return reads, MemoryState(weights, momentum, anchor, position), surprise
