"""What an adaptation carries from one call to the next."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from titans.state import map_state, register_state, state_nbytes


@register_state
@dataclass(frozen=True, eq=False)
class AdaptationState:
    """The fast weights after a text, and the running chunk; float32 at least, except for the integers.

    Args:
        weight: (batch, hidden, hidden) and bias: (batch, vocab): the fast weights, as differences from the
            start.
        momentum: () or the momentum of both.
        position: (batch,) int64, tokens that were read while learning.
        inputs: (batch, chunk, hidden), the features of the running chunk.
        errors: (batch, chunk, hidden), the gradients of its losses with respect to the adapted states, and
            curvatures: (batch, chunk), those of the same losses; both 0 where the label is not known yet.
        bias_gradient: (batch, vocab), the sum of the chunk's gradients with respect to the logits.
        pending: (batch, hidden), the adapted state of the last token. log_probs: (batch, vocab), its
            prediction; zeros before the first token. mean: (batch, hidden) and trace: (batch,), those of the
            head's rows under this prediction. awaits: (batch,) int64, 1 where the last token's loss
            will be learned once its label is known.
    """

    weight: Tensor
    bias: Tensor
    momentum: tuple[Tensor, ...]
    position: Tensor
    inputs: Tensor
    errors: Tensor
    curvatures: Tensor
    bias_gradient: Tensor
    pending: Tensor
    log_probs: Tensor
    mean: Tensor
    trace: Tensor
    awaits: Tensor

    def detach(self) -> AdaptationState:
        """The same values, cut off from the autograd graph."""
        return map_state(Tensor.detach, self)

    def nbytes(self) -> int:
        """Bytes held."""
        return state_nbytes(self)
