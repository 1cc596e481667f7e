"""Plain attention to the last tokens of a window: a baseline without a memory, at constant cost."""

from __future__ import annotations

from torch import Tensor, nn

from titans.nn.attention.window import WindowAttention, WindowState
from titans.nn.blocks.protocol import BlockResult
from titans.nn.blocks.settings import BlockSettings
from titans.nn.context import BlockContext
from titans.nn.norm import RMSNorm


class WindowBlock(nn.Module):
    """x + attention(norm(x)), each token to the last `window`."""

    has_memory = False

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        s = settings
        self.norm = RMSNorm(s.hidden_size, s.norm_eps)
        self.attention = WindowAttention(s.hidden_size, s.num_heads, s.head_dim, s.window, s.rope_theta)

    def initial_state(self, batch: int) -> WindowState:
        weight = self.norm.weight
        return self.attention.initial_state(batch, weight.device, weight.dtype)

    def fresh_context(self, state: WindowState) -> WindowState:
        """An initial state: nothing is kept, for there is no memory."""
        return self.initial_state(state.position.shape[0])

    def forward(self, x: Tensor, state: WindowState, context: BlockContext) -> BlockResult:
        """x (batch, time, hidden_size), packed rows, to the same shape, and the new state."""
        y, state = self.attention(self.norm(x), state, None, context.packed)
        return BlockResult(x + y, state)
