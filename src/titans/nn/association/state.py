"""What an association carries from one call to the next."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from titans.state import map_state, register_state, state_nbytes


@register_state
@dataclass(frozen=True, eq=False)
class AssociationState:
    """The fast weights after a text, and its last token; float32 at least.

    Args:
        weight: (batch, heads, value_size, feature_size), the fast weights; 0 at first.
        previous: (batch, layers, hidden), the whitened states of the last token, from which the key of the
            next write is made; 0 before the first token, whose key is therefore 0.
        position: (batch,) int64, tokens that were read while learning.
    """

    weight: Tensor
    previous: Tensor
    position: Tensor

    def detach(self) -> AssociationState:
        """The same values, cut off from the autograd graph."""
        return map_state(Tensor.detach, self)

    def nbytes(self) -> int:
        """Bytes held."""
        return state_nbytes(self)
