"""Hope (arXiv 2512.24695): memories that make their own keys, values and gates, then a continuum."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from titans.nn.blocks.protocol import BlockResult
from titans.nn.blocks.settings import BlockSettings
from titans.nn.context import BlockContext
from titans.nn.memory.continuum import ContinuumMemory, ContinuumState, PeriodicMemory
from titans.nn.memory.self_modifying import SelfModifyingMemory, SelfModifyingState
from titans.nn.norm import RMSNorm
from titans.state import register_state

# Chunks in the periods of the continuum, unless the settings have their own.
PERIODS = (4, 16, 64)


@register_state
@dataclass(frozen=True)
class HopeState:
    memory: SelfModifyingState
    continuum: ContinuumState


class HopeBlock(nn.Module):
    """x + self-modifying memory(norm(x)), then a chain of memories, each updated after its period."""

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        s = settings
        for name in ("local_chunk_sizes", "caching"):
            if (value := getattr(s, name)) is not None:
                raise ValueError(
                    f"{name}={value!r} with variant='hope': its memories have no such schedule; give None, "
                    "or another variant"
                )
        self.persistent = s.persistent_tokens()
        self.norm = RMSNorm(s.hidden_size, s.norm_eps)
        options = {name: s.memory_options[name] for name in ("half_lives",) if name in s.memory_options}
        self.memory = SelfModifyingMemory(
            s.hidden_size, s.num_heads, s.head_dim, s.chunk_size, conv_kernel=s.conv_kernel, **options
        )

        def make(period: int) -> PeriodicMemory:
            return PeriodicMemory(*s.sizes(period), conv_kernel=s.conv_kernel, **s.memory_options)

        periods = s.periods or [n * s.chunk_size for n in PERIODS]
        self.continuum = ContinuumMemory(s.hidden_size, periods, make, s.norm_eps)

    def initial_state(self, batch: int) -> HopeState:
        return HopeState(
            self.memory.initial_state(batch, self.persistent), self.continuum.initial_state(batch)
        )

    def fresh_context(self, state: HopeState) -> HopeState:
        """An initial state that keeps what all memories have learned."""
        return HopeState(
            self.memory.fresh_context(state.memory), self.continuum.fresh_context(state.continuum)
        )

    def forward(self, x: Tensor, state: HopeState, context: BlockContext) -> BlockResult:
        """x (batch, time, hidden_size), packed rows, to the same shape, and the new state."""
        y, memory, trace = self.memory(self.norm(x), state.memory, context)
        x, continuum = self.continuum(x + y, state.continuum, context)
        return BlockResult(x, HopeState(memory, continuum), trace)
