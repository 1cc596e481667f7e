"""Products of consecutive gates, exact for gates of 0 and 1, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _DecayProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor) -> Tensor:
        size = gates.shape[-1]
        below = torch.ones(size, size, dtype=torch.bool, device=gates.device).tril(-1)
        products = torch.where(below, gates.unsqueeze(-1), 1).cumprod(-2).tril()
        ctx.save_for_backward(products)
        return products

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # P = (I − diag(g) shift)⁻¹, so dL/dg_l = (Pᵀ dP Pᵀ)[l, l−1]: two products and no division by a gate.
        (products,) = ctx.saved_tensors
        sensitivity = products.mT @ grads[0].tril() @ products.mT
        return torch.nn.functional.pad(sensitivity.diagonal(-1, -2, -1), (1, 0))


def decay_products(gates: Tensor) -> Tensor:
    """P[…, t, i] = ∏ gates[…, i+1 … t] for i ≤ t (1 on the diagonal), 0 above it: (…, n) to (…, n, n).

    Differences of cumulative logarithms give NaN or wrong gradients at a closed gate; this form has no
    division, so it is exact for every gate in [0, 1]. The first gate never enters a product.
    """
    return _DecayProducts.apply(gates)  # type: ignore[no-any-return]
