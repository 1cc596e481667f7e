"""What a chunk of any length leaves, without a table of its length squared."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.memory.rules.coefficients import EndCoefficients, rounded
from titans.memory.rules.rule import UpdateRule

# Tokens in a block of `end_coefficients`: as much in tables of a block as in passing from block to block.
_BLOCK = 32


def end_coefficients(
    rule: UpdateRule, forget: Tensor, momentum: Tensor, step_size: Tensor, written: Tensor | None
) -> EndCoefficients:
    """The state after a chunk of any length, without the table of (time, time) that reads within it take.

    The chunk is cut into blocks; what a block wrote passes through the later ones, which is linear.
    Arguments as of `UpdateRule.coefficients`.
    """
    time, dtype = step_size.shape[-1], step_size.dtype
    width = min(time, _BLOCK)
    missing = -time % width
    if missing and written is None:
        written = torch.ones_like(step_size, dtype=torch.bool)

    def blocks(x: Tensor) -> Tensor:
        return F.pad(x, (0, missing)).unflatten(-1, (-1, width))

    block = rule.coefficients(
        blocks(forget),
        blocks(momentum),
        blocks(step_size),
        None if written is None else blocks(written),
    )
    # In double precision until the end: products of many small numbers, which then vanish together.
    change, moved, carried, steps, momentum_steps = (
        x.double()
        for x in (
            block.end_weights,
            block.end_momentum,
            block.momentum_momentum,
            block.end_steps,
            block.momentum_steps,
        )
    )
    # The later blocks, as one: W ← W + later_change W + later_moved S, S ← later_carried S.
    later_change = later_moved = torch.zeros_like(change[..., -1, :, :])
    later_carried = torch.ones_like(later_change)
    later = []
    for index in reversed(range(change.shape[-3])):
        later.append((later_change, later_moved, later_carried))
        a, c, e = (x[..., index, :, :] for x in (change, moved, carried))
        later_change, later_moved, later_carried = (
            later_change + a + later_change * a,
            c + later_change * c + later_moved * e,
            later_carried * e,
        )
    change_after, moved_after, carried_after = (
        torch.stack(each[::-1], -3) for each in zip(*later, strict=True)
    )
    end_steps = steps + change_after * steps + moved_after * momentum_steps
    return EndCoefficients(
        end_weights=later_change.to(dtype),
        end_momentum=rounded(later_moved, dtype),
        end_steps=rounded(end_steps, dtype).flatten(-3, -2)[..., :time, :],
        momentum_momentum=rounded(later_carried, dtype),
        momentum_steps=rounded(carried_after * momentum_steps, dtype).flatten(-3, -2)[..., :time, :],
    )
