"""What a memory is trained on at test time, for the kernels of the scan, forward and back.

The objective is a sum of φ(M(k) − v) over features. Two constants choose φ: OBJECTIVE is 0 for the squared
error, 1 for Huber, 2 for l_p (`known.py`), and PARAMETER is δ or p. The formulas are those of
`titans.memory.objectives`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans.memory.backends.triton.elementary import _across, _normed


@triton.jit
def _lp_weight(size, PARAMETER: tl.constexpr):
    """size^(p − 2)."""
    if PARAMETER == 2:
        return size * 0 + 1
    elif PARAMETER == 3:
        return size
    elif PARAMETER == 4:
        return size * size
    else:
        power = tl.exp2((PARAMETER - 2) * tl.log2(tl.where(size > 0, size, size * 0 + 1)))
        return tl.where(size > 0, power, size * 0)


@triton.jit
def _clamped(error, DELTA: tl.constexpr):
    # Not tl.clamp, which takes a number in float32 even where x is float64.
    error = tl.where(error > DELTA, error * 0 + DELTA, error)
    return tl.where(error < -DELTA, error * 0 - DELTA, error)


@triton.jit
def _loss(error, OBJECTIVE: tl.constexpr, PARAMETER: tl.constexpr):
    """φ of each error."""
    if OBJECTIVE == 0:
        return error * error
    elif OBJECTIVE == 1:
        within = _clamped(error, PARAMETER)
        return within * (2 * error - within)
    else:
        return _lp_weight(tl.abs(error), PARAMETER) * error * error


@triton.jit
def _loss_slope(error, OBJECTIVE: tl.constexpr, PARAMETER: tl.constexpr):
    """φ′ of each error."""
    if OBJECTIVE == 0:
        return 2 * error
    elif OBJECTIVE == 1:
        return 2 * _clamped(error, PARAMETER)
    else:
        return PARAMETER * _lp_weight(tl.abs(error), PARAMETER) * error


@triton.jit
def _loss_bend(error, OBJECTIVE: tl.constexpr, PARAMETER: tl.constexpr):
    """φ″ of each error, or one number for all."""
    if OBJECTIVE == 0:
        return 2.0
    elif OBJECTIVE == 1:
        return tl.where(tl.abs(error) > PARAMETER, error * 0, error * 0 + 2)
    else:
        return PARAMETER * (PARAMETER - 1) * _lp_weight(tl.abs(error), PARAMETER)


@triton.jit
def _curvature(error, OBJECTIVE: tl.constexpr, PARAMETER: tl.constexpr):
    """A bound on φ″ between each token's errors and 0: (CHUNK,) for l_p, one number for the others."""
    if OBJECTIVE == 2:
        return PARAMETER * (PARAMETER - 1) * _lp_weight(tl.max(tl.abs(error), 1), PARAMETER)
    else:
        return 2.0


@triton.jit
def _curvature_backward(error, grad, PARAMETER: tl.constexpr):
    """The gradient of the errors from that of l_p's `_curvature`; the largest errors of a token share it."""
    largest = tl.max(tl.abs(error), 1)
    is_largest = tl.abs(error) == largest[:, None]
    share = grad * (PARAMETER - 2) * _curvature(error, 2, PARAMETER)
    share /= tl.where(largest > 0, largest, largest * 0 + 1) * tl.sum(tl.where(is_largest, 1, 0), 1)
    return tl.where(is_largest, tl.where(error < 0, -share[:, None], share[:, None]), error * 0)


@triton.jit
def _objective(
    features, keys, values, gain, bias, EPS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    OBJECTIVE: tl.constexpr, PARAMETER: tl.constexpr,
):  # fmt: skip
    """M(k) − v, the objective's gradient with respect to the features f(k), and LayerNorm(f) with its
    factors.

    features, keys, values: (CHUNK, DIM). gain, bias: (DIM,).
    """
    if NORM:
        normed, scale = _normed(features, EPS)
        error = normed * gain[None, :] + bias[None, :] - values
    else:
        normed, scale = features, tl.sum(features, 1)
        error = features - values
    if RESIDUAL:
        error += keys
    delta = _loss_slope(error, OBJECTIVE, PARAMETER)
    if NORM:
        delta = scale[:, None] * _across(delta * gain[None, :], normed)
    return error, delta, normed, scale


@triton.jit
def _objective_backward(
    grad, error, normed, scale, steepness, grad_factor, gain,
    NORM: tl.constexpr, OBJECTIVE: tl.constexpr, PARAMETER: tl.constexpr,
):  # fmt: skip
    """`_objective` in reverse: the gradients of error, features and gain, and of the squared slope of the
    gain's largest number.

    grad: of delta, (CHUNK, DIM). grad_factor: of the curvature in the features, (CHUNK,), by which step
    normalizers were multiplied: c, with a norm c scale² steepness.
    """
    bend = _loss_bend(error, OBJECTIVE, PARAMETER)
    curvature = _curvature(error, OBJECTIVE, PARAMETER)
    if NORM:
        through = _loss_slope(error, OBJECTIVE, PARAMETER) * gain[None, :]
        grad = scale[:, None] * grad
        by_through = _across(grad, normed)
        by_error = bend * gain[None, :] * by_through
        if OBJECTIVE == 2:
            by_error += _curvature_backward(error, grad_factor * scale * scale * steepness, PARAMETER)
        by_gain = tl.sum(_loss_slope(error, OBJECTIVE, PARAMETER) * by_through + by_error * normed, 0)
        by_scale = tl.sum(grad * _across(through, normed), 1) / scale
        by_scale += 2 * curvature * grad_factor * scale * steepness
        by_steepness = tl.sum(curvature * grad_factor * scale * scale, 0)
        along = (tl.sum(through * normed, 1) / grad.shape[1])[:, None]
        grad_along = (tl.sum(grad * normed, 1) / grad.shape[1])[:, None]
        by_normed = by_error * gain[None, :] - grad * along - through * grad_along
        by_features = scale[:, None] * _across(by_normed, normed)
        by_features -= normed * (by_scale * scale * scale / grad.shape[1])[:, None]
    else:
        by_error = bend * grad
        if OBJECTIVE == 2:
            by_error += _curvature_backward(error, grad_factor, PARAMETER)
        by_features, by_gain, by_steepness = by_error, tl.sum(grad, 0), tl.sum(grad_factor, 0)
    return by_error, by_features, by_gain, by_steepness
