"""The memory alone (section 4.4)."""

from __future__ import annotations

from torch import Tensor, nn

from titans.nn.blocks.protocol import BlockResult
from titans.nn.blocks.settings import BlockSettings
from titans.nn.context import BlockContext
from titans.nn.memory import NeuralMemoryState
from titans.nn.norm import RMSNorm


class LMMBlock(nn.Module):
    """x + memory(norm(x)), persistent tokens read first."""

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        self.persistent = settings.persistent_tokens()
        self.norm = RMSNorm(settings.hidden_size, settings.norm_eps)
        self.memory = settings.memory()

    def initial_state(self, batch: int) -> NeuralMemoryState:
        return self.memory.initial_state(batch, self.persistent)

    def fresh_context(self, state: NeuralMemoryState) -> NeuralMemoryState:
        """An initial state that keeps what the memory has learned."""
        return self.memory.fresh_context(state)

    def forward(self, x: Tensor, state: NeuralMemoryState, context: BlockContext) -> BlockResult:
        """x (batch, time, hidden_size), packed rows, to the same shape, and the new state."""
        y, state, trace = self.memory(self.norm(x), state, context=context)
        return BlockResult(x + y, state, trace)
