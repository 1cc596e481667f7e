"""What a memory is trained on at test time, ‖M(k) − v‖², for the kernels of the scan, forward and back."""

from __future__ import annotations

import triton
import triton.language as tl

from titans.memory.backends.triton.elementary import _across, _normed


@triton.jit
def _objective(
    features, keys, values, gain, bias, EPS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr
):
    """M(k) − v, its squared length's gradient with respect to the features f(k), and LayerNorm(f) with its
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
    delta = 2 * error
    if NORM:
        delta = scale[:, None] * _across(delta * gain[None, :], normed)
    return error, delta, normed, scale


@triton.jit
def _objective_backward(
    grad, error, normed, scale, steepness, grad_factor, gain,
    NORM: tl.constexpr,
):  # fmt: skip
    """`_objective` in reverse: the gradients of error, features and gain, and of the squared slope of the
    gain's largest number.

    grad: of delta, (CHUNK, DIM). grad_factor: of what the norm's steepness has multiplied step normalizers
    by, 2 scale² steepness, (CHUNK,).
    """
    if NORM:
        through = 2 * error * gain[None, :]
        grad = scale[:, None] * grad
        by_through = _across(grad, normed)
        by_error = 2 * gain[None, :] * by_through
        by_gain = tl.sum(2 * error * by_through + by_error * normed, 0)
        by_scale = tl.sum(grad * _across(through, normed), 1) / scale + 4 * grad_factor * scale * steepness
        by_steepness = tl.sum(2 * grad_factor * scale * scale, 0)
        along = (tl.sum(through * normed, 1) / grad.shape[1])[:, None]
        grad_along = (tl.sum(grad * normed, 1) / grad.shape[1])[:, None]
        by_normed = by_error * gain[None, :] - grad * along - through * grad_along
        by_features = scale[:, None] * _across(by_normed, normed)
        by_features -= normed * (by_scale * scale * scale / grad.shape[1])[:, None]
    else:
        by_error = 2 * grad
        by_features, by_gain, by_steepness = by_error, tl.sum(grad, 0), tl.sum(grad_factor, 0)
    return by_error, by_features, by_gain, by_steepness
