"""The mean of vectors and the inverse root of their covariance."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Whitening(NamedTuple):
    """Float64. mean: (size,). root: (size, size), symmetric: what x − mean is multiplied by. length: the root
    mean square of ‖root (x − mean)‖, somewhat less than √size because of the floor."""

    mean: Tensor
    root: Tensor
    length: float


@torch.no_grad()
def whitening_of(x: Tensor, floor: float = 0.01) -> Whitening:
    """The inverse root of the covariance of vectors x (n, size), whose precision the products have.

    Args:
        floor: the share of the mean eigenvalue by which each eigenvalue of the covariance is raised.

    Raises:
        ValueError: for vectors that are all the same, or not finite.
    """
    mean = x.mean(0, dtype=torch.float64)
    centred = x - mean.to(x.dtype)
    covariance = (centred.T @ centred).double() / max(len(x) - 1, 1)
    total = float(covariance.trace())
    if not 0 < total < math.inf:
        raise ValueError(
            f"the covariance of {len(x)} vector(s) is {total}: give some that differ, without NaN"
        )
    values, vectors = torch.linalg.eigh(covariance)
    scales = (values.clamp_min(0) + floor * values.mean()).rsqrt()
    return Whitening(
        mean, (vectors * scales) @ vectors.T, float((values.clamp_min(0) * scales.square()).sum().sqrt())
    )
