"""What the kernels of the scan share: products, activations, how rows settle, how steps are normalised.

The names are those of `MemoryNetwork`, where each is explained.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(rows: tl.constexpr, columns: tl.constexpr):
    """Offsets of a contiguous (rows, columns) tile."""
    return tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    """ACTIVATION: 0 GELU, 1 SiLU, 2 sin (`ACTIVATION_SWITCH` in `known.py`)."""
    if ACTIVATION == 0:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == 1:
        return x * tl.sigmoid(x)
    else:
        return tl.sin(x)


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    """The activation's derivative."""
    if ACTIVATION == 0:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == 1:
        gate = tl.sigmoid(x)
        return gate * (1 + x * (1 - gate))
    else:
        return tl.cos(x)


@triton.jit
def _bend(x, ACTIVATION: tl.constexpr):
    """The activation's second derivative."""
    if ACTIVATION == 0:
        return 0.3989422804014327 * tl.exp(-0.5 * x * x) * (2 - x * x)
    elif ACTIVATION == 1:
        gate = tl.sigmoid(x)
        return gate * (1 - gate) * (2 + x * (1 - 2 * gate))
    else:
        return -tl.sin(x)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """A matrix product; PRECISION as `tl.dot` has it, or "bf16" for operands rounded to bfloat16."""
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _with_base(fast, base, HAS_BASE: tl.constexpr):
    if HAS_BASE:
        fast += tl.load(base)
    return fast


@triton.jit
def _row_scale(square, radius):
    """What rows of that squared length are multiplied by when they settle, and 0 for those left alone."""
    length = tl.sqrt(square)
    rescaled = length > radius
    scale = radius / tl.where(rescaled, length, 1.0)
    return tl.where(rescaled, scale, 1.0), tl.where(rescaled, scale, 0.0)


@triton.jit
def _unsettle(settled, scale, grad, along, radius):
    """`rules.shorten_rows_backward` from what it left. scale: as `_row_scale` marks it. along: Σ settled
    · grad of each whole row."""
    through = scale[:, None] * (grad - settled * (along / (radius * radius))[:, None])
    return tl.where((scale > 0)[:, None], through, grad)


@triton.jit
def _kappa(square, rows, floor):
    """The squared slope of a layer from ‖W‖², 1.13² (‖W‖² + rows floor²)."""
    return 1.2769 * (square + rows * floor)


@triton.jit
def _at_least(x, least):
    # Not tl.maximum, which takes a number in float32 even where x is float64.
    return tl.where(x < least, x * 0 + least, x)


@triton.jit
def _normalizer(square, factor, floor, depth):
    """`MemoryNetwork.step_normalizers` of a layer from ‖h‖² of each token and all else that multiplies it."""
    return depth * _at_least(factor * _at_least(square, floor), 1e-6)


@triton.jit
def _normalizer_slopes(square, factor, floor, depth, grad):
    """Its gradients with respect to ‖h‖² and to the factor of each token."""
    floored = _at_least(square, floor)
    grad = tl.where(factor * floored >= 1e-6, depth * grad, 0)
    return tl.where(square >= floor, grad * factor, 0), grad * floored


@triton.jit
def _normed(x, eps):
    """Rows with mean 0 and mean square 1, and the factor, (rows,), that made it so."""
    x -= (tl.sum(x, 1) / x.shape[1])[:, None]
    scale = 1 / tl.sqrt(tl.sum(x * x, 1) / x.shape[1] + eps)
    return x * scale[:, None], scale


@triton.jit
def _across(x, normed):
    """Rows without their mean and without what lies along `normed`: what a LayerNorm lets through."""
    along = tl.sum(x * normed, 1) / x.shape[1]
    return x - (tl.sum(x, 1) / x.shape[1])[:, None] - normed * along[:, None]
