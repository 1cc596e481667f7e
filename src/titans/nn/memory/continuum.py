"""A continuum of memories: a chain of networks, each updated after a period of its own (arXiv 2512.24695)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from titans.nn.context import BlockContext
from titans.nn.memory.layer import NeuralMemory, NeuralMemoryState
from titans.nn.norm import RMSNorm
from titans.state import register_state


class PeriodicMemory(NeuralMemory):
    """A `NeuralMemory` that answers with the weights its running chunk began with."""

    read_anchor = True


@register_state
@dataclass(frozen=True)
class ContinuumState:
    """levels: the state of each memory, the one updated most often first."""

    levels: tuple[NeuralMemoryState, ...]


class ContinuumMemory(nn.Module):
    """h_l = h_{l−1} + M_l(norm(h_{l−1})), the weights of M_l being updated every `periods[l]` tokens.

    An update is the sum of the gradients of the period's tokens at the weights before it (equation 71).

    Args:
        hidden_size: width of input and output.
        periods: in tokens.
        make: a memory whose weights change every so many tokens.
        norm_eps: of the norm before each memory.
    """

    def __init__(
        self,
        hidden_size: int,
        periods: Sequence[int],
        make: Callable[[int], PeriodicMemory],
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(make(period) for period in periods)
        self.norms = nn.ModuleList(RMSNorm(hidden_size, norm_eps) for _ in periods)

    def _levels(self) -> list[PeriodicMemory]:
        return [level for level in self.levels if isinstance(level, PeriodicMemory)]

    def initial_state(self, batch: int) -> ContinuumState:
        """The state of rows that have read nothing."""
        return ContinuumState(tuple(level.initial_state(batch) for level in self._levels()))

    def fresh_context(self, state: ContinuumState) -> ContinuumState:
        """What the memories have learned, at the start of a new text; periods still open are closed."""
        pairs = zip(self._levels(), state.levels, strict=True)
        return ContinuumState(tuple(level.fresh_context(known) for level, known in pairs))

    def forward(
        self, x: Tensor, state: ContinuumState, context: BlockContext
    ) -> tuple[Tensor, ContinuumState]:
        """Read a stretch: x (batch, time, hidden_size), packed rows, to the same shape, and the new state."""
        states = []
        for level, norm, known in zip(self._levels(), self.norms, state.levels, strict=True):
            y, after, _ = level(norm(x), known, context=context)
            x = x + y
            states.append(after)
        return x, ContinuumState(tuple(states))
