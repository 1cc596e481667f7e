"""Memory as layer: the memory, then window attention over what it made of the tokens (section 4.3, (29) to
(31))."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from titans.nn.attention.window import WindowAttention, WindowState
from titans.nn.blocks.protocol import BlockResult
from titans.nn.blocks.settings import BlockSettings
from titans.nn.context import BlockContext
from titans.nn.memory import NeuralMemoryState
from titans.nn.norm import RMSNorm
from titans.state import register_state


@register_state
@dataclass(frozen=True)
class MALState:
    memory: NeuralMemoryState
    window: WindowState


class MALBlock(nn.Module):
    """x + memory(norm(x)), then x + attention(norm(x)), each with its own norm and residual."""

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        s = settings
        self.persistent = s.persistent_tokens()
        self.memory_norm = RMSNorm(s.hidden_size, s.norm_eps)
        self.memory = s.memory()
        self.attention_norm = RMSNorm(s.hidden_size, s.norm_eps)
        self.attention = WindowAttention(s.hidden_size, s.num_heads, s.head_dim, s.window, s.rope_theta)

    def initial_state(self, batch: int) -> MALState:
        return MALState(
            self.memory.initial_state(batch, self.persistent),
            self.attention.initial_state(batch, self.persistent.device, self.persistent.dtype),
        )

    def fresh_context(self, state: MALState) -> MALState:
        """An initial state, the window empty, that keeps what the memory has learned."""
        fresh = self.initial_state(state.memory.tail.shape[0])
        return replace(fresh, memory=self.memory.fresh_context(state.memory))

    def forward(self, x: Tensor, state: MALState, context: BlockContext) -> BlockResult:
        """x (batch, time, hidden_size), packed rows, to the same shape, and the new state."""
        y, memory, trace = self.memory(self.memory_norm(x), state.memory, context=context)
        x = x + y
        y, window = self.attention(self.attention_norm(x), state.window, self.persistent, context.packed)
        return BlockResult(x + y, MALState(memory, window), trace)
