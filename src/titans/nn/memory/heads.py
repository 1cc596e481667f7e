"""From a projection to the vectors that a memory takes, and from its answers to a block's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from titans.nn import kernels
from titans.nn.conv import CausalConv
from titans.nn.kernels import native
from titans.nn.norm import ReadNorm, shorten, unit_queries
from titans.nn.packing import ALL_REAL, Packed

# For `head_vectors`: not shortened to a length but brought to length 1.
UNIT = 0.0


def head_vectors(
    conv: CausalConv,
    x: Tensor,
    tail: Tensor,
    head_dim: int,
    longest: Sequence[float],
    packed: Packed = ALL_REAL,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> tuple[list[Tensor], Tensor]:
    """Convolve, pass through SiLU, and bring each head's vectors to their length.

    Args:
        conv: the filter; `tail`, `packed` and `reset` are as there.
        x: (batch, time, parts · heads · head_dim), packed rows.
        longest: for each part `UNIT`, or the length that no vector may exceed.
        backend: which kernels may run, see `titans.nn.kernels`.

    Raises:
        ValueError: for a tail of another filter.

    Returns:
        For each part (batch, time, heads, head_dim), unit vectors in at least float32, and the new tail.
    """
    if kernels.allows(backend, "native") and native.refuses(head_dim, x, tail, conv.weight) is None:
        # Compiled code would read beyond what there is; below, the filter looks itself.
        conv.check_tail(x, tail)
        vectors = native.filter_heads(x, tail, conv.weight, reset, packed.lengths, longest, head_dim)
        return vectors, conv.next_tail(x, tail, packed, reset)
    filtered, tail = conv(x, tail, packed, reset, backend)
    parts = F.silu(filtered).unflatten(-1, (len(longest), -1, head_dim)).unbind(2)
    return [
        unit_queries(part) if limit == UNIT else shorten(part, limit)
        for part, limit in zip(parts, longest, strict=True)
    ], tail


def gated_answers(
    norm: ReadNorm, reads: Tensor, prior: Tensor | None, gate: Tensor, backend: str = "auto"
) -> Tensor:
    """norm(reads, prior) · silu(gate): (batch, time, heads · head_dim) in the dtype of the gate.

    reads, prior: (batch, time, heads, head_dim). gate: (batch, time, heads · head_dim).
    backend: which kernels may run, see `titans.nn.kernels`.
    """
    if prior is not None and norm.prior is not None and kernels.allows(backend, "native"):
        weights = norm.taught.weight, norm.prior.weight
        if native.refuses(reads.shape[-1], reads, prior, gate, *weights) is None:
            return native.gated_answers(reads, prior, gate, *weights, norm.taught.eps)
    return norm(reads, prior).flatten(-2).to(gate.dtype) * F.silu(gate)
