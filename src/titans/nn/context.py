"""How a stretch is read, and the trace of what a memory did at each of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from titans.nn.packing import ALL_REAL, Packed
from titans.state import register_state


@dataclass(frozen=True)
class BlockContext:
    """How a stretch is read; the same for every layer of a model.

    packed: which tokens of each row are real; they come first.
    trace: whether memories return a `MemoryTrace`.
    frozen: whether memories stop learning: every step size is 0, while forgetting and momentum go on.
    """

    packed: Packed = ALL_REAL
    trace: bool = False
    frozen: bool = False


@register_state
@dataclass(frozen=True)
class MemoryTrace:
    """What a memory did at each token of a stretch; of a memory with local ones, what the global one did.

    surprise: (batch, time, heads), ‖M(k) − v‖² before the token is written, outside the autograd graph.
    forget, momentum, step_size: (batch, time, heads, depth), the gates as functions of the token; forget is
        the mean over rows where these have gates of their own. A step size is not yet divided by its
        normalizer, see `NeuralMemory.applied_step_size`.
    step_logits: (batch, time, heads, depth), the step size before its sigmoid.
    keys, values: (batch, time, heads, key_dim) and (…, head_dim), what is written. Keys have been through the
        layer's feature map; without one they are of unit length. After a value come the objective's inputs,
        if it takes any.
    weight_norm: (batch, heads), Frobenius norm of the fast weights after the stretch.
    """

    surprise: Tensor
    forget: Tensor
    momentum: Tensor
    step_size: Tensor
    step_logits: Tensor
    keys: Tensor
    values: Tensor
    weight_norm: Tensor

    def map_tokens(self, function: Callable[[Tensor], Tensor]) -> MemoryTrace:
        """Apply a function to all that is (batch, time, ...)."""
        return replace(self, **{name: function(getattr(self, name)) for name in _PER_TOKEN})

    @staticmethod
    def joined(traces: Sequence[MemoryTrace]) -> MemoryTrace:
        """The trace of stretches that follow one another as that of one stretch."""
        parts = {name: torch.cat([getattr(trace, name) for trace in traces], 1) for name in _PER_TOKEN}
        return replace(traces[-1], **parts)


_PER_TOKEN = [field.name for field in fields(MemoryTrace) if field.name != "weight_norm"]
