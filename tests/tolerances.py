"""How far apart two computations of the same numbers may be, and why."""

from __future__ import annotations

from torch import Tensor

# Two backends, or two ways of cutting a stretch, in float64: rounding, amplified by some forty inner updates.
FLOAT64 = 1e-10
# The same, float32 against float64: a thousand roundings.
FLOAT32 = 1e-4


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """The largest difference is at most `tolerance` times the largest expected number (at least 0.01)."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, not {expected.dtype}"
    assert expected.isfinite().all(), f"{what}: the expected numbers are not finite"
    if not expected.numel():
        return
    off = (actual - expected).abs().max().item()
    allowed = tolerance * max(expected.abs().max().item(), 1e-2)
    assert off <= allowed, f"{what}: off by {off:.3g}, allowed {allowed:.3g}"
