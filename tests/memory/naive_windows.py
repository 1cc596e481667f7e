"""OmegaNet and Atlas (arXiv 2505.23735) and LaCT (arXiv 2505.23884) as their equations state them, in loops.

Nothing here is of the package. Muon's iteration is the package's cubic in place of the papers' quintics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def orthogonalised(step: Tensor, floor: float) -> Tensor:
    x = step / (step.square().sum((-2, -1), keepdim=True) + floor**2).sqrt()
    for _ in range(8):
        x = 1.5 * x - 0.5 * x @ x.transpose(-2, -1) @ x
    return x


def window_gradient(
    memory: Tensor, keys: Tensor, values: Tensor, gamma: Tensor, t: int, window: int
) -> Tensor:
    """Σ over i from t − c + 1 to t of γ_i ∇‖M k_i − v_i‖² at M (batch, heads, out, in)."""
    total = torch.zeros_like(memory)
    for i in range(max(0, t - window + 1), t + 1):
        error = torch.einsum("bhij,bhj->bhi", memory, keys[:, i]) - values[:, i]
        total = total + gamma[:, i, :, None, None] * 2 * torch.einsum("bhi,bhj->bhij", error, keys[:, i])
    return total


def omega_net(
    memory: Tensor, queries: Tensor, keys: Tensor, values: Tensor, retain: Tensor, gamma: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """Atlas (9): M_t = α_t M_{t−1} − Σ γ_i ∇ℓ(M_{t−1}; k_i, v_i); gates (batch, time, heads)."""
    reads = []
    for t in range(keys.shape[1]):
        slope = window_gradient(memory, keys, values, gamma, t, window)
        memory = retain[:, t, :, None, None] * memory - slope
        reads.append(torch.einsum("bhij,bhj->bhi", memory, queries[:, t]))
    return torch.stack(reads, 1), memory


def atlas(
    memory: Tensor, queries: Tensor, keys: Tensor, values: Tensor,
    retain: Tensor, carry: Tensor, gamma: Tensor, window: int, rate: float, floor: float, chunk_size: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Atlas (32), (33): S_t = θ_t S_{t−1} − Σ γ_i ∇ℓ_i, M_t = α_t M_{t−1} + η NS(S_t), at chunk ends alone
    where chunks are longer than a token; gradients, and reads, are at the memory before the chunk (reads of
    chunks of a token at the memory after it)."""
    surprise, anchor, reads = torch.zeros_like(memory), memory, []
    for t in range(keys.shape[1]):
        slope = window_gradient(anchor, keys, values, gamma, t, window)
        surprise = carry[:, t, :, None, None] * surprise - slope
        memory = retain[:, t, :, None, None] * memory
        if (t + 1) % chunk_size == 0:
            memory = memory + rate * orthogonalised(surprise, floor)
        knowing = memory if chunk_size == 1 else anchor
        reads.append(torch.einsum("bhij,bhj->bhi", knowing, queries[:, t]))
        if (t + 1) % chunk_size == 0:
            anchor = memory
    return torch.stack(reads, 1), memory


def lact(
    weights: list[Tensor], queries: Tensor, keys: Tensor, values: Tensor, rates: Tensor, carry: Tensor,
    chunk_size: int, floor: float,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """LaCT's SwiGLU f(x) = W_2 (silu(W_1 x) ⊙ W_3 x), here W_1, W_3, W_2: apply, then update, chunk by chunk.

    The loss is −⟨f(k), v⟩. rates: (batch, time, heads, 3), a step size for each token and matrix. carry:
    (batch, chunks, heads), how much of the last chunk's step is added.
    """
    gate, up, down = weights
    lengths = [w.norm(dim=-1, keepdim=True) for w in weights]
    steps = [torch.zeros_like(w) for w in weights]
    reads = []
    for n, start in enumerate(range(0, keys.shape[1], chunk_size)):
        q, k, v, lr = (
            x[:, start : start + chunk_size].transpose(1, 2) for x in (queries, keys, values, rates)
        )
        reads.append(((F.silu(q @ gate.mT) * (q @ up.mT)) @ down.mT).transpose(1, 2))
        before, other = k @ gate.mT, k @ up.mT
        sigmoid = torch.sigmoid(before)
        back = v @ down
        to_gate = back * other * sigmoid * (1 + before * (1 - sigmoid))
        to_up = back * before * sigmoid
        found = [
            (to_gate * lr[..., :1]).mT @ k,
            (to_up * lr[..., 1:2]).mT @ k,
            (v * lr[..., 2:]).mT @ (before * sigmoid * other),
        ]
        steps = [carry[:, n, :, None, None] * s + g for s, g in zip(steps, found, strict=True)]
        moved = [w + orthogonalised(s, floor) for w, s in zip((gate, up, down), steps, strict=True)]
        gate, up, down = (
            w / (w.norm(dim=-1, keepdim=True) + 1e-5) * length
            for w, length in zip(moved, lengths, strict=True)
        )
    return torch.cat(reads, 1), [gate, up, down]
