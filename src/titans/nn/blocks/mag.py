"""Memory as gate: window attention and memory side by side (section 4.2, equations 26 to 28)."""

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
class MAGState:
    window: WindowState
    memory: NeuralMemoryState


class MAGBlock(nn.Module):
    """x + gate(attention(norm(x)), memory(norm(x)))."""

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        s = settings
        self.persistent = s.persistent_tokens()
        self.norm = RMSNorm(s.hidden_size, s.norm_eps)
        self.attention = WindowAttention(s.hidden_size, s.num_heads, s.head_dim, s.window, s.rope_theta)
        self.memory = s.memory()
        self.gate = s.combination()

    def initial_state(self, batch: int) -> MAGState:
        return MAGState(
            self.attention.initial_state(batch, self.persistent.device, self.persistent.dtype),
            self.memory.initial_state(batch, self.persistent),
        )

    def fresh_context(self, state: MAGState) -> MAGState:
        """An initial state, the window empty, that keeps what the memory has learned."""
        fresh = self.initial_state(state.memory.tail.shape[0])
        return replace(fresh, memory=self.memory.fresh_context(state.memory))

    def forward(self, x: Tensor, state: MAGState, context: BlockContext) -> BlockResult:
        """x (batch, time, hidden_size), packed rows, to the same shape, and the new state."""
        normed = self.norm(x)
        attention, window = self.attention(normed, state.window, self.persistent, context.packed)
        memory, remembered, trace = self.memory(normed, state.memory, context=context)
        return BlockResult(x + self.gate(attention, memory), MAGState(window, remembered), trace)
