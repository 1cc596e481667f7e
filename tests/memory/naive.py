"""Updates of the papers that have no published code, token by token, as their equations state them.

Each has weights W_1, W_2 of M(x) = x + LN(W_2 gelu(W_1 x)) for (batch, heads), and `retain`, the part that is
kept: 1 − α of Titans. Nothing here is of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = list[Tensor]


def memory(weights: Weights, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """M(x) for x (batch, heads, width) and gain, bias (heads, width)."""
    hidden = F.gelu(torch.einsum("bhij,bhj->bhi", weights[0], x))
    out = torch.einsum("bhij,bhj->bhi", weights[1], hidden)
    centred = out - out.mean(-1, keepdim=True)
    return x + centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + bias


def gradient(
    weights: Weights, key: Tensor, value: Tensor, norm: Sequence[Tensor], loss: Callable[[Tensor], Tensor]
) -> Weights:
    """∇ of loss(M(k) − v), summed over batch and heads, which share nothing."""
    leaves = [w.clone().requires_grad_() for w in weights]
    error = memory(leaves, key, *norm) - value
    return list(torch.autograd.grad(loss(error), leaves))


# A gradient at some weights, from a loss of the error (batch, heads, width).
Slope = Callable[[Callable[[Tensor], Tensor], Weights], Weights]
# From a token's number, what is carried, and `Slope`: what is carried after it, and the weights.
Update = Callable[[int, Weights, Slope], tuple[Weights, Weights]]


def scan(
    queries: Tensor, keys: Tensor, values: Tensor, carried: Weights, norm: Sequence[Tensor], update: Update
) -> tuple[Tensor, Weights]:
    """Token by token: reads with the weights just written, and what is carried at last."""
    reads = []
    for t in range(keys.shape[1]):

        def slope(loss: Callable[[Tensor], Tensor], at: Weights, t: int = t) -> Weights:
            return gradient(at, keys[:, t], values[:, t], norm, loss)

        carried, weights = update(t, carried, slope)
        reads.append(memory(weights, queries[:, t], *norm))
    return torch.stack(reads, 1), carried


def moneta(retain: Tensor, step: Tensor, p: float, q: float) -> Update:
    """MIRAS (24), (25): A_t = α A − η ∇‖e‖_p^p, W_t = A_t / ‖A_t‖_q^(q − 2). Gates (batch, time, heads)."""

    def weights(carried: Weights) -> Weights:
        lengths = [x.abs().pow(q).sum((-2, -1), keepdim=True).pow(1 / q) for x in carried]
        return [x / length ** (q - 2) for x, length in zip(carried, lengths, strict=True)]

    def update(t: int, carried: Weights, slope: Slope) -> tuple[Weights, Weights]:
        slopes = slope(lambda error: error.abs().pow(p).sum(), weights(carried))
        a, eta = retain[:, t, :, None, None], step[:, t, :, None, None]
        carried = [a * x - eta * g for x, g in zip(carried, slopes, strict=True)]
        return carried, weights(carried)

    return update


def yaad(retain: Tensor, step: Tensor, delta: Tensor) -> Update:
    """MIRAS (26): W_t = α W − η ∇‖e‖² where ‖e‖ ≤ δ, and α W − η δ ∇‖e‖₁ elsewhere."""

    def update(t: int, carried: Weights, slope: Slope) -> tuple[Weights, Weights]:
        def loss(error: Tensor) -> Tensor:
            short = error.detach().norm(dim=-1) <= delta[:, t]
            return torch.where(short, error.square().sum(-1), delta[:, t] * error.abs().sum(-1)).sum()

        a, eta = retain[:, t, :, None, None], step[:, t, :, None, None]
        carried = [a * w - eta * g for w, g in zip(carried, slope(loss, carried), strict=True)]
        return carried, carried

    return update


def memora(retain: Tensor, step: Tensor, mass: float) -> Update:
    """MIRAS (27): W_t = c softmax(α log W − η ∇‖e‖²), row by row; the weights themselves are carried."""

    def update(t: int, carried: Weights, slope: Slope) -> tuple[Weights, Weights]:
        slopes = slope(lambda error: error.square().sum(), carried)
        a, eta = retain[:, t, :, None, None], step[:, t, :, None, None]
        moved = [a * w.log() - eta * g for w, g in zip(carried, slopes, strict=True)]
        carried = [mass * torch.softmax(x, -1) for x in moved]
        return carried, carried

    return update


def titans(forget: Sequence[Tensor], momentum: Tensor, step: Tensor, chunk_size: int) -> Update:
    """Titans (13), (14) with diag(1 − α), α (batch, time, heads, rows) for each layer; the gradients of a
    chunk are taken at the weights before it (16)."""
    anchor: Weights = []
    surprise: Weights = []

    def update(t: int, carried: Weights, slope: Slope) -> tuple[Weights, Weights]:
        nonlocal anchor, surprise
        if t % chunk_size == 0:
            anchor = carried
        surprise = surprise or [torch.zeros_like(w) for w in carried]
        slopes = slope(lambda error: error.square().sum(), anchor)
        eta, theta = momentum[:, t, :, None, None], step[:, t, :, None, None]
        surprise = [eta * s - theta * g for s, g in zip(surprise, slopes, strict=True)]
        rows = [1 - alpha[:, t, :, :, None] for alpha in forget]
        carried = [keep * w + s for keep, w, s in zip(rows, carried, surprise, strict=True)]
        return carried, carried

    return update
