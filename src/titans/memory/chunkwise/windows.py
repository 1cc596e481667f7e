"""What rules with a window change in a chunk: which tokens' gradients it takes, and how much each counts.

The gradient of a token before the chunk is an outer product, known at the chunk's start, as is any other. The
step at a token takes those of its window, so a gradient counts what all steps count in whose windows it is.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from titans.memory.chunkwise.chunk import KeyPass
from titans.memory.rules import ChunkCoefficients, EndCoefficients, UpdateRule
from titans.memory.rules.window import Window, summed_over_windows
from titans.memory.state import MemoryState

Coefficients = TypeVar("Coefficients", ChunkCoefficients, EndCoefficients)


def over_windows(rule: UpdateRule, coefficients: Coefficients) -> Coefficients:
    """From coefficients of a chunk's steps, made with a step size of 1, to those of the gradients of the
    `window − 1` tokens before it and of its own, in order; of a rule without a window the same."""
    if rule.window == 1:
        return coefficients
    c = coefficients
    steps = {
        name: summed_over_windows(getattr(c, name).mT, rule.window).mT
        for name in ("end_steps", "momentum_steps")
    }
    if isinstance(c, ChunkCoefficients):
        steps["read_steps"] = summed_over_windows(c.read_steps, rule.window)
    return c._replace(**steps)


def step_sizes(rule: UpdateRule, step_size: Tensor) -> Tensor:
    """Those to make coefficients with: 1 for a rule with a window, whose gradients have been multiplied."""
    return step_size if rule.window == 1 else step_size.new_ones(()).expand_as(step_size)


def seen_by_chunk(
    rule: UpdateRule, state: MemoryState, new: Window, filled: Tensor | None
) -> tuple[Window, MemoryState]:
    """The tokens whose gradients a chunk of these new ones takes, and the state with those of them that the
    next chunk takes again.

    filled: (rows, width), which places of the chunk are tokens, the first ones of each row; None for all.
    """
    if rule.window == 1:
        return new, state
    seen, count = Window(*state.extra[:3]).followed_by(new), rule.window - 1
    kept = seen.newest(count) if filled is None else seen.from_each(filled.sum(-1), count)
    extra = (*kept, *state.extra[3:])
    return seen, MemoryState(state.weights, state.momentum, state.anchor, state.position, extra)


def multiplied(rule: UpdateRule, found: KeyPass, seen: Window, width: int) -> KeyPass:
    """Gradients of the tokens of a window multiplied by their step sizes, and the surprise of the newest."""
    if rule.window == 1:
        return found
    scaled = [d * seen.step_size[..., i : i + 1] for i, d in enumerate(found.scaled)]
    return found._replace(scaled=scaled, surprise=found.surprise[..., -width:])
