"""A language model's head as the adaptation needs it: logits of a hidden state, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor


@runtime_checkable
class Head(Protocol):
    """What turns a hidden state into logits."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) → (..., vocab_size)."""
        ...

    def gradient(
        self, hidden: Tensor, probs: Tensor, labels: Tensor, logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the loss −log p(label) has at `hidden`, with other logits added behind the head.

        Args:
            hidden: (..., hidden_size). probs: (..., vocab_size), the prediction. labels: (...) int64.
            logits: the head's own, if they are known already.

        Returns:
            gradient: (..., hidden_size), Σ_i (p_i − [i = label]) ∂logit_i/∂hidden, in the dtype of `probs`.
            curvature: (...), an estimate from above of the largest eigenvalue of the Hessian.
        """
        ...


@dataclass(frozen=True)
class LinearHead:
    """softcap · tanh(scale · (E h + bias) / softcap), without softcap scale · (E h + bias).

    Args:
        weight: E, (vocab_size, hidden_size), not to be changed afterwards. bias: (vocab_size,). softcap: a
            bound on every logit, as Gemma 2 has. scale: what multiplies the logits, as in Cohere's models.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def gradient(
        self, hidden: Tensor, probs: Tensor, labels: Tensor, logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Head`. With J the rows ∂logit_i/∂hidden, the gradient is their mean minus the label's.

        The Hessian (of Gauss and Newton, with a softcap) is the covariance of the rows under the prediction,
        and its trace a bound on its eigenvalues. A step towards the label changes the prediction, and with it
        the Hessian: the curvature is the largest trace on the straight path from the prediction to the label,
        (1 − λ)(trace + λ ‖gradient‖²) at the best λ in [0, 1].
        """
        wide = probs.dtype
        rows, own = probs * self.scale, self.weight[labels].to(wide) * self.scale
        squares = rows * self.scale
        if self.softcap is not None:
            logits = self.logits(hidden) if logits is None else logits
            slopes = 1 - (logits.to(wide) / self.softcap).square()
            rows, squares = rows * slopes, squares * slopes.square()
            own = own * slopes.gather(-1, labels[..., None])
        mean = (rows.to(self.weight.dtype) @ self.weight).to(wide)
        gradient = mean - own
        trace = (squares @ self._row_squares().to(wide) - mean.square().sum(-1)).clamp_min(0)
        far = gradient.square().sum(-1)
        # The floor keeps the derivative finite where prediction and label agree.
        path = (trace + far).square() / (4 * far).clamp_min(torch.finfo(wide).tiny)
        return gradient, torch.where(far > trace, path, trace)

    def _row_squares(self) -> Tensor:
        """‖E_i‖², computed once for each device: (vocab_size,), float32 at least."""
        known = self.__dict__.setdefault("_squares", {})
        device = self.weight.device
        if device not in known:
            # Whatever the mode of the first call, later ones may need gradients.
            with torch.inference_mode(False), torch.no_grad():
                weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
                known[device] = weight.square().sum(-1)
        return known[device]

    def row_variance(self) -> float:
        """The mean squared distance of the rows of E, times the scale, from their mean."""
        weight = self.weight.detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return float((weight - weight.mean(0)).square().sum(-1).mean()) * self.scale**2


@dataclass(frozen=True)
class FunctionHead:
    """Any differentiable function (..., hidden_size) → (..., vocab_size).

    Args:
        curvature: a bound on the largest eigenvalue of the Hessian of any label's loss.
    """

    function: Callable[[Tensor], Tensor]
    curvature: float

    def logits(self, hidden: Tensor) -> Tensor:
        return self.function(hidden)

    def gradient(
        self, hidden: Tensor, probs: Tensor, labels: Tensor, logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        logits, pull = torch.func.vjp(self.function, hidden)
        error = probs.scatter_add(-1, labels[..., None], -torch.ones_like(probs[..., :1]))
        gradient = pull(error.to(logits.dtype))[0].to(probs.dtype)
        return gradient, torch.full_like(gradient[..., 0], self.curvature)


def as_head(head: Head | Tensor) -> Head:
    """A head of a weight (vocab_size, hidden_size), or the head given."""
    return LinearHead(head) if isinstance(head, Tensor) else head
