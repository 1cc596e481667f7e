"""What writing costs: a term of the loss for memories that are to keep what they have for long.

A memory with room for a hundred facts has lost the first of them after a few thousand tokens written over it,
however slowly it forgets. What a token written now takes from a token asked about much later is all but
invisible in a row of training; a price on writing stands for it. Only the slower half of the heads pays, and
not for statements that the training text asks about and their answers: a price on these too is cheapest to
escape by writing nothing at all. The faster heads are free to learn from everything, for the next word's
sake, and so are local memories, which forget with every shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.nn import NeuralMemory


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


def write_cost(logits: list[Tensor], reach: float, spared: Tensor | None = None) -> Tensor:
    """Mean over tokens, slower heads and layers of log(1 + eʳ θ / (θ_max − θ)), a scalar; 0 without any.

    reach: r; steps below e⁻ʳ of the largest are all but free. Down to there a gate is pushed down as hard
    when it is nearly closed as when it is open: what counts far off is the order of magnitude.
    spared: (batch, time) bool, tokens that pay nothing, because they are going to be asked for. Persistent
    tokens pay like all.
    """
    costs, place = [], 0
    for x in logits:
        cost = F.softplus(x[..., (x.shape[-2] + 1) // 2 :, :] + reach)
        if spared is not None and len(x) == len(spared):
            # A layer may read a stretch in pieces, the last of them filled up.
            end = place + x.shape[1]
            here = F.pad(spared[:, place:end], (0, max(end - spared.shape[1], 0)))
            place = end if end < spared.shape[1] else 0
            cost = torch.where(here[..., None, None], 0, cost)
        costs.append(cost.flatten())
    every = torch.cat(costs) if costs else torch.zeros(0)
    return every.sum() / max(len(every), 1)
