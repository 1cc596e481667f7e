"""Rows that are distracted: from some place on, half of their heads remember what another row has read.

What a memory writes now it may be asked for a million tokens later, and no row of training is that long.
Within a row every head still knows everything, so that none learns to keep what others will have lost. After
a distraction the faster half of a row's heads know another text, as if they had read so much that nothing of
the row is left; what was said before can be recalled from the slower ones alone, and these learn, with a
gradient, to write it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.memory import MemoryState

# The part of a row, at either end, that is left in one piece.
_MARGIN = 8


def draw_distraction(
    generator: np.random.Generator, rows: int, time: int, chunk_size: int, share: float
) -> tuple[Tensor, int]:
    """Which rows, (rows,) bool, and before which of their tokens, where a chunk begins."""
    chosen = torch.from_numpy(generator.random(rows) < share)
    place = int(generator.integers(time // _MARGIN, time - time // _MARGIN)) if time > 1 else 0
    return chosen, place // chunk_size * chunk_size


def distracted(states: tuple[Any, ...], rows: Tensor) -> tuple[Any, ...]:
    """The blocks' states with the faster half of the heads of these rows, (batch,) bool, having learned what
    the row before them has, and not what they have.

    Heads are in the order of their half-lives, the faster ones first; gradients go to where they come from.
    """

    def of_neighbours(memory: MemoryState) -> MemoryState:
        def exchange(x: Tensor) -> Tensor:
            fast = (x.shape[1] + 1) // 2
            chosen = rows.to(x.device).view(-1, *[1] * (x.dim() - 1))
            return torch.cat([torch.where(chosen, x[:, :fast].roll(1, 0), x[:, :fast]), x[:, fast:]], 1)

        weights, momentum, anchor = (
            tuple(map(exchange, part)) for part in (memory.weights, memory.momentum, memory.anchor)
        )
        return MemoryState(weights, momentum, anchor, memory.position)

    return pytree.tree_map(
        lambda state: of_neighbours(state) if isinstance(state, MemoryState) else state,
        states,
        is_leaf=lambda state: isinstance(state, MemoryState),
    )
