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

    def pullback(self, hidden: Tensor, cotangent: Tensor, logits: Tensor | None = None) -> Tensor:
        """The gradient with respect to `hidden` of Σ cotangent · logits(hidden), in the cotangent's dtype.

        Args:
            logits: those of `hidden`, if they are known already.
        """
        ...


@dataclass(frozen=True)
class LinearHead:
    """softcap · tanh(scale · (E h + bias) / softcap), without softcap scale · (E h + bias).

    Args:
        weight: E, (vocab_size, hidden_size). bias: (vocab_size,). softcap: a bound on every logit, as
            Gemma 2 has; scale: what multiplies the logits, as in Cohere's and Granite's models.
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

    def pullback(self, hidden: Tensor, cotangent: Tensor, logits: Tensor | None = None) -> Tensor:
        wide = cotangent.dtype
        if self.softcap is not None:
            logits = self.logits(hidden) if logits is None else logits
            cotangent = cotangent * (1 - (logits.to(wide) / self.softcap).square())
        return ((cotangent * self.scale).to(self.weight.dtype) @ self.weight).to(wide)

    def curvature(self) -> float:
        """A bound on the largest eigenvalue of the cross-entropy's Hessian in the hidden state.

        The Hessian is the covariance of the rows of E under the predicted distribution. Along a unit vector
        the variance of any distribution is at most a quarter of its range squared, and the range is at most
        the diameter of the rows: no prediction has more than the squared radius of a ball around them. With a
        softcap the cross-entropy is not convex, and this is the value without one.
        """
        weight = self.weight.detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return float((weight - weight.mean(0)).square().sum(-1).max()) * self.scale**2


@dataclass(frozen=True)
class FunctionHead:
    """Any differentiable function (..., hidden_size) → (..., vocab_size)."""

    function: Callable[[Tensor], Tensor]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.function(hidden)

    def pullback(self, hidden: Tensor, cotangent: Tensor, logits: Tensor | None = None) -> Tensor:
        logits, pull = torch.func.vjp(self.function, hidden)
        return pull(cotangent.to(logits.dtype))[0].to(cotangent.dtype)


def as_head(head: Head | Tensor | Callable[[Tensor], Tensor]) -> Head:
    """A head of a weight (vocab_size, hidden_size), a function, or a head."""
    if isinstance(head, Tensor):
        return LinearHead(head)
    return head if isinstance(head, Head) else FunctionHead(head)
