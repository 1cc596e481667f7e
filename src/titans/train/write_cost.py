"""What writing costs: a term of the loss for memories that are to keep what they have for long.

A memory with room for a hundred facts has lost the first of them after a few thousand tokens written over it,
however slowly it forgets. What a token written now takes from a token asked about much later is all but
invisible in a row of training; a price on writing stands for it. Only the slower half of the heads pays; the
others are free to learn from everything, for the next word's sake.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.nn import NeuralMemory

# Steps below e⁻⁸ of the largest are all but free. Up to there a gate is pushed down as hard when it is nearly
# closed as when it is open: what counts far off is the order of magnitude.
_FREE = 8.0


@contextmanager
def collected_write_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """The step-size logits (batch, time, heads, depth) of all that memories read within this block."""
    found: list[Tensor] = []
    hooks = [
        module.step_size_gate.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))
        for module in model.modules()
        if isinstance(module, NeuralMemory)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def write_cost(logits: list[Tensor]) -> Tensor:
    """Mean over tokens, slower heads and layers of log(1 + e⁸ θ / (θ_max − θ)), a scalar; 0 without any."""
    costs = [F.softplus(x[..., (x.shape[-2] + 1) // 2 :, :] + _FREE).flatten() for x in logits]
    every = torch.cat(costs) if costs else torch.zeros(0)
    return every.sum() / max(len(every), 1)
