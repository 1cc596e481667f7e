"""A language model's head as the adaptation needs it: logits of a hidden state, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor


@runtime_checkable
class Head(Protocol):
    """A map from hidden states to logits, with the derivatives that the adaptation needs."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) → (..., vocab_size)."""
        ...

    def moments(self, hidden: Tensor, probs: Tensor, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and spread of the rows ∂logit_i/∂hidden under a prediction.

        Args:
            hidden: (..., hidden_size). probs: (..., vocab_size).
            logits: the head's, if the caller has them already.

        Returns:
            mean: (..., hidden_size), in the dtype of `probs`.
            trace: (...), of their covariance, or a bound on its largest eigenvalue.
        """
        ...

    def row(self, hidden: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """∂logit_label/∂hidden, (..., hidden_size) in `dtype`; labels: (...) int64."""
        ...


def curvature(trace: Tensor, gradient: Tensor) -> Tensor:
    """The largest trace on the straight path from a prediction to the label, (...).

    The Hessian of the loss −log p(label) in the state is the covariance of the head's rows under the
    prediction (with a softcap, that of Gauss and Newton), whose eigenvalues its trace bounds. A step towards
    the label changes the prediction, and with it the Hessian: after a fraction λ of the path the trace is
    (1 − λ)(trace + λ ‖gradient‖²).

    Args:
        trace: (...), at the prediction.
        gradient: (..., hidden_size), of the loss: the mean of the rows minus the label's.
    """
    far = gradient.square().sum(-1)
    # The floor keeps the derivative finite where prediction and label agree.
    path = (trace + far).square() / (4 * far).clamp_min(torch.finfo(far.dtype).tiny)
    return torch.where(far > trace, path, trace)


@dataclass(frozen=True)
class LinearHead:
    """softcap · tanh(scale · (E h + bias) / softcap), without softcap scale · (E h + bias).

    Args:
        weight: E, (vocab_size, hidden_size); must not change afterwards. bias: (vocab_size,). softcap: a
            bound on every logit, as Gemma 2 has. scale: a factor of the logits, as in Cohere's models.
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

    def moments(self, hidden: Tensor, probs: Tensor, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide = probs.dtype
        # A product with 1 would pass over two more tensors of the size of the vocabulary for each token.
        rows = probs if self.scale == 1.0 else probs * self.scale
        squares = probs if self.scale == 1.0 else rows * self.scale
        if self.softcap is not None:
            slopes = self._slopes(self.logits(hidden) if logits is None else logits, wide)
            rows, squares = rows * slopes, squares * slopes.square()
        mean = (rows.to(self.weight.dtype) @ self.weight).to(wide)
        trace = squares @ self._row_squares().to(wide) - mean.square().sum(-1)
        return mean, trace.clamp_min(0)

    def row(self, hidden: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        row = self.weight[labels]
        if self.softcap is None:
            return row.to(dtype) * self.scale
        logit = (row * hidden.to(row.dtype)).sum(-1) + (0 if self.bias is None else self.bias[labels])
        capped = self.softcap * torch.tanh(logit * self.scale / self.softcap)
        return row.to(dtype) * self.scale * self._slopes(capped, dtype)[..., None]

    def _slopes(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """The derivative of the softcap at each logit."""
        return 1 - (logits.to(dtype) / (self.softcap or 1.0)).square()

    def _row_squares(self) -> Tensor:
        """‖E_i‖², computed once for each device: (vocab_size,), float32 at least."""
        known = self.__dict__.setdefault("_squares", {})
        device = self.weight.device
        if device not in known:
            # The first call may be in inference mode while later ones need gradients.
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

    def moments(self, hidden: Tensor, probs: Tensor, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean = self._pulled(hidden, probs)
        return mean, torch.full_like(mean[..., 0], self.curvature)

    def row(self, hidden: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        return self._pulled(hidden, None, labels).to(dtype)

    def _pulled(self, hidden: Tensor, cotangent: Tensor | None, labels: Tensor | None = None) -> Tensor:
        logits, pull = cast("tuple[Tensor, Any]", torch.func.vjp(self.function, hidden))
        if labels is not None:
            cotangent = torch.zeros_like(logits).scatter(-1, labels[..., None], 1.0)
        assert cotangent is not None
        return pull(cotangent.to(logits.dtype))[0].to(cotangent.dtype)


def as_head(head: Head | Tensor) -> Head:
    """A head of a weight (vocab_size, hidden_size), or the head given."""
    return LinearHead(head) if isinstance(head, Tensor) else head
