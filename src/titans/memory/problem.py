"""One call's worth of checked, promoted inputs, as every backend receives them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans.memory.inner import InnerProblem
from titans.memory.state import MemoryState


@dataclass(frozen=True)
class ScanProblem:
    """The arguments of `memory_scan`, all floating tensors in the compute dtype.

    queries, keys, values: (batch, time, heads, head_dim). forget, momentum, step_size: (batch, time, heads,
        depth).
    gain, bias: (heads, 1, head_dim) or None. mask, reset: (batch, time) bool or None.
    base: (heads, out, in) each, added to the fast weights wherever the network is run, or None.
    initial, initial_momentum: (heads, out, in) each, or None; where `reset` starts a row afresh.
    read_anchor: answer with the weights the chunk began with, not with those just written.
    """

    inner: InnerProblem
    queries: Tensor
    keys: Tensor
    values: Tensor
    forget: Tensor
    momentum: Tensor
    step_size: Tensor
    state: MemoryState
    chunk_size: int
    gain: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    reset: Tensor | None
    initial: tuple[Tensor, ...] | None
    initial_momentum: tuple[Tensor, ...] | None
    base: tuple[Tensor, ...] | None
    read_anchor: bool

    @property
    def needs_grad(self) -> bool:
        """Whether autograd has to know of this scan."""
        layered = (*self.state.weights, *self.state.momentum, *self.state.anchor, *(self.base or ()))
        slow = (self.gain, self.bias, *(self.initial or ()), *(self.initial_momentum or ()))
        tokens = (self.queries, self.keys, self.values, self.forget, self.momentum, self.step_size)
        return torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (*tokens, *layered, *slow)
        )

    def fresh_state(self) -> MemoryState:
        """The state in which a reset leaves a row, for every row."""
        assert self.initial is not None
        batch = self.keys.shape[0]
        weights = tuple(w.expand(batch, *w.shape) for w in self.initial)
        if self.initial_momentum is None:
            momentum = tuple(torch.zeros_like(w) for w in weights)
        else:
            momentum = tuple(m.expand(batch, *m.shape) for m in self.initial_momentum)
        return MemoryState(weights, momentum, weights, torch.zeros_like(self.state.position))
