"""The memory's state as a value: what one sequence has learned so far. It goes in as an argument and comes
out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titans.state import map_state, register_state, state_nbytes


@register_state
@dataclass(frozen=True)
class MemoryState:
    """Everything a memory carries from one call to the next.

    Attributes:
        weights: W_1 … W_L of every sequence and head, each (batch, heads, out, in).
        momentum: S_1 … S_L, past surprise, the same shapes (equation 14).
        anchor: the weights at the start of the running chunk, at which every gradient of the chunk is taken.
            Equal to `weights` whenever position % chunk_size == 0.
        position: (batch,) int64, real tokens written so far.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    anchor: tuple[Tensor, ...]
    position: Tensor

    @classmethod
    def initial(cls, weights: Sequence[Tensor]) -> MemoryState:
        """A memory that has read nothing: the given weights, each (batch, heads, out, in), and no momentum.

        Fast weights are kept in at least float32, whatever the dtype of the model.
        """
        raised = tuple(w.to(torch.promote_types(w.dtype, torch.float32)) for w in weights)
        position = torch.zeros(raised[0].shape[0], dtype=torch.int64, device=raised[0].device)
        return cls(raised, tuple(torch.zeros_like(w) for w in raised), raised, position)

    def detach(self) -> MemoryState:
        """The same values, cut off from the autograd graph."""
        return map_state(Tensor.detach, self)

    def nbytes(self) -> int:
        """Bytes held, counting a tensor that stands in two places once."""
        return state_nbytes(self)
