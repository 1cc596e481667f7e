"""What an association carries from one call to the next."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from titans.state import map_state, register_state, state_nbytes


@register_state
@dataclass(frozen=True, eq=False)
class AssociationState:
    """The fast weights after a text, and its last tokens; float32 at least, except for the integers.

    Args:
        weight: (batch, hidden, feature_size), the fast weights; 0 at first.
        states: (batch, layers, hidden), the whitened states of the last token; 0 before the first.
        recent: (batch, number of recent tokens) int64, the last tokens, the newest last; −1 for none.
        salience: of each of them, its log; 0 for none.
        position: (batch,) int64, tokens that were read while learning.
    """

    weight: Tensor
    states: Tensor
    recent: Tensor
    salience: Tensor
    position: Tensor

    def detach(self) -> AssociationState:
        """The same values, cut off from the autograd graph."""
        return map_state(Tensor.detach, self)

    def nbytes(self) -> int:
        """Bytes held."""
        return state_nbytes(self)
