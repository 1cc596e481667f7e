"""What a token-mixing block is."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from titans.nn.context import BlockContext, MemoryTrace


class BlockResult(NamedTuple):
    """x: (batch, time, hidden_size). state: after the stretch. trace: the memory's, or None without a memory
    and where the context does not ask for it."""

    x: Tensor
    state: Any
    trace: MemoryTrace | None = None


class Block(Protocol):
    """A module that mixes tokens, made from `BlockSettings`; norms and residuals are its own.

    A state is a frozen dataclass registered with `titans.state.register_state`, whose tensors have the batch
    in dimension 0. Reading a stretch in pieces gives what reading it at once gives.

    has_memory: whether it has a long-term memory; False for a baseline.
    """

    has_memory: ClassVar[bool] = True

    def initial_state(self, batch: int) -> Any:
        """The state of rows that have read nothing but the persistent tokens."""
        ...

    def fresh_context(self, state: Any) -> Any:
        """An initial state that keeps the long-term memory's fast weights and momentum, and nothing else."""
        ...

    def __call__(self, x: Tensor, state: Any, context: BlockContext) -> BlockResult:
        """Read a stretch: x (batch, time, hidden_size), packed rows, from a state to the next."""
        ...
