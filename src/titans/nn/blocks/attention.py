"""Plain causal attention over everything seen: the baseline, without a memory."""

from __future__ import annotations

from torch import Tensor, nn

from titans.nn.attention.full import FullAttention, FullAttentionState
from titans.nn.blocks.protocol import BlockResult
from titans.nn.blocks.settings import BlockSettings
from titans.nn.context import BlockContext
from titans.nn.norm import RMSNorm


class AttentionBlock(nn.Module):
    """x + attention(norm(x)); the state grows with what has been seen."""

    has_memory = False

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        s = settings
        self.norm = RMSNorm(s.hidden_size, s.norm_eps)
        self.attention = FullAttention(s.hidden_size, s.num_heads, s.head_dim, s.rope_theta)

    def initial_state(self, batch: int) -> FullAttentionState:
        weight = self.norm.weight
        return self.attention.initial_state(batch, weight.device, weight.dtype)

    def fresh_context(self, state: FullAttentionState) -> FullAttentionState:
        """An initial state: nothing is kept, for there is no memory."""
        return self.initial_state(state.position.shape[0])

    def forward(self, x: Tensor, state: FullAttentionState, context: BlockContext) -> BlockResult:
        """x (batch, time, hidden_size), packed rows, to the same shape, and the new state."""
        y, state = self.attention(self.norm(x), state, context.packed)
        return BlockResult(x + y, state)
