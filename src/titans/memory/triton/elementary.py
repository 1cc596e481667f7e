"""What the kernels of the scan share: the activations, how rows settle, and how steps are normalised.

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
def _activation(x, GELU: tl.constexpr):
    if GELU:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        return x * tl.sigmoid(x)


@triton.jit
def _slope(x, GELU: tl.constexpr):
    """The activation's derivative."""
    if GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
    else:
        gate = tl.sigmoid(x)
        return gate * (1 + x * (1 - gate))


@triton.jit
def _bend(x, GELU: tl.constexpr):
    """The activation's second derivative."""
    if GELU:
        return 0.3989422804014327 * tl.exp(-0.5 * x * x) * (2 - x * x)
    else:
        gate = tl.sigmoid(x)
        return gate * (1 - gate) * (2 + x * (1 - 2 * gate))


@triton.jit
def _row_scale(square, radius):
    """What shortens rows of that squared length to `radius`, where they are longer."""
    length = tl.sqrt(square)
    return tl.where(length > radius, radius / tl.maximum(length, radius), 1.0)


@triton.jit
def _settle(weight, radius):
    """Rows longer than `radius` shortened to it, and what each row was multiplied by."""
    scale = _row_scale(tl.sum(weight * weight, 1), radius)
    return weight * scale[:, None], scale


@triton.jit
def _unsettle(settled, scale, grad, radius):
    """`MemoryNetwork.settle_backward` from what it left."""
    along = tl.sum(settled * grad, 1) / (radius * radius)
    through = scale[:, None] * (grad - settled * along[:, None])
    return tl.where((scale < 1)[:, None], through, grad)


@triton.jit
def _kappa(row_squares, floor):
    """The squared slope of a layer with these squared rows, 1.13² (‖W‖² + out floor²)."""
    return 1.2769 * (tl.sum(row_squares, 0) + row_squares.shape[0] * floor)


@triton.jit
def _normalizer(square, factor, floor, depth):
    """`MemoryNetwork.step_normalizers` of a layer from ‖h‖² of each token and all else that multiplies it."""
    return depth * tl.maximum(factor * tl.maximum(square, floor), 1e-6)


@triton.jit
def _normalizer_slopes(square, factor, floor, grad):
    """Its gradients with respect to ‖h‖² and to the factor, of two layers."""
    floored = tl.maximum(square, floor)
    grad = tl.where(factor * floored >= 1e-6, 2 * grad, 0)
    return tl.where(square >= floor, grad * factor, 0), tl.sum(grad * floored, 0)
