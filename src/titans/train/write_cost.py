"""A price on writing: a term of the loss for memories that are to keep what they have for long.

A memory with room for a hundred facts has lost the first of them after a few thousand tokens written over it,
however slowly it forgets. What a token written now costs a token predicted much later is all but invisible in
a row of training; a price on writing stands for it. Only the slower half of the heads pays, and not for
statements that the training text asks about and their answers: a price on these too is cheapest to escape by
writing nothing at all. The faster heads are free to learn from everything, which helps to predict the next
word, and so are local memories, which forget with every shard.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.nn import MemoryTrace


def write_cost(
    traces: Sequence[MemoryTrace], reach: float, read: Tensor | None = None, spared: Tensor | None = None
) -> Tensor:
    """Mean over tokens, slower heads and layers of log(1 + eʳ θ / (θ_max − θ)), a scalar; 0 without any.

    Args:
        traces: of each memory layer.
        reach: r; steps below e⁻ʳ of the largest are all but free. Down to there a gate is pushed down as hard
            when it is nearly closed as when it is open: what counts in the end is the order of magnitude.
        read: (batch, time) bool, tokens that were read and so count; None for all.
        spared: (batch, time) bool, tokens that count and pay nothing.
    """
    if not traces:
        return torch.zeros(())
    total, count = torch.zeros((), device=traces[0].step_logits.device), 0
    for trace in traces:
        logits = trace.step_logits[..., (trace.step_logits.shape[-2] + 1) // 2 :, :]
        cost = F.softplus(logits + reach)
        for free in (spared, None if read is None else ~read):
            if free is not None:
                cost = cost.masked_fill(free[..., None, None], 0)
        total = total + cost.sum()
        count = count + (cost[..., 0, 0].numel() if read is None else read.sum()) * cost[0, 0].numel()
    return total / count
