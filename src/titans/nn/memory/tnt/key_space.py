"""Queries, turned towards the keys that a memory has seen."""

from __future__ import annotations

import torch
from torch import Tensor

from titans.memory.precision import autocast_device
from titans.nn.norm import unit_queries
from titans.nn.packing import zero_padding

# P_t q_t may be short where the keys are not: a query is often nearly orthogonal to a shard's first key.
_SHORTEST = 1e-4
# Tokens that look at each other one by one; what is before them is a matrix of (head_dim, head_dim).
_BLOCK = 64


def towards_keys(
    queries: Tensor, keys: Tensor, key_sum: Tensor, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """P_t q_t, brought to unit length, with P_t = Σ_{j ≤ t} k_j k_jᵀ (TNT, equation 7).

    A memory is written at keys and read at queries, and its answer far from any key means little: P_t q_t
    lies in the span of the keys. It is a sum and no projector, so that it grows with the number of keys; the
    network was written at unit keys, hence the unit length.

    Args:
        queries, keys: (batch, time, heads, head_dim), keys being unit vectors.
        key_sum: P before the first token, (batch, heads, head_dim, head_dim), symmetric.
        real: (batch, time) bool, tokens whose key counts; None for all.

    Returns:
        (batch, time, heads, head_dim) and P after the last token, both in at least float32.
    """
    batch, time, heads, head_dim = keys.shape
    if not time:
        return queries, key_sum
    width = min(time, _BLOCK)
    dtype = torch.promote_types(keys.dtype, torch.float32)

    def blocks(x: Tensor) -> Tensor:
        """(batch, heads, blocks, width, head_dim)."""
        padded = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, 0, 0, -time % width))
        return padded.view(batch, -1, width, heads, head_dim).permute(0, 3, 1, 2, 4)

    with torch.autocast(autocast_device(keys), enabled=False):
        q, k = blocks(queries), blocks(zero_padding(keys, real))
        sums = torch.cat([key_sum.to(dtype).unsqueeze(2), k.mT @ k], 2).cumsum(2)
        seen = q @ sums[:, :, :-1] + (q @ k.mT).tril() @ k
    seen = seen.permute(0, 2, 3, 1, 4).reshape(batch, -1, heads, head_dim)[:, :time]
    return unit_queries(seen, _SHORTEST), sums[:, :, -1].clone()
