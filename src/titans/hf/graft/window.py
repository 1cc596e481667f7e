"""Attention over sinks, the previous block and the current block, at bounded positions.

A text is cut into blocks of half a window, from its first token on. A token sees the first few tokens of the
text (the sinks), the whole block before its own, and its own block up to itself. These tokens have
positions 0, 1, 2, …: in the first two blocks their positions in the text; afterwards the sinks come first,
then the previous block, then the current one. The cache holds rotated keys. When a block ends, its keys are
rotated back once, to the positions of the previous block; when the next block ends, they are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titans.state import register_state


@register_state
@dataclass(frozen=True)
class WindowState:
    """The keys and values that attention can still see.

    keys, values: for each layer (rows, heads, slots, head_dim), the first `Window.slots` of a row are valid.
    position: (rows,) int64, real tokens read.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    position: Tensor

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]

    def row(self, index: int, slots: int) -> WindowState:
        """One row alone, with its own slots."""
        keys, values = (tuple(x[[index], :, :slots] for x in layers) for layers in (self.keys, self.values))
        return WindowState(keys, values, self.position[[index]])


@dataclass(frozen=True)
class Window:
    """size: tokens of two blocks. sinks: first tokens of the text that every token sees.

    Raises:
        ValueError: for sizes that make no window.
    """

    size: int
    sinks: int

    def __post_init__(self) -> None:
        for name, value, least in (("window", self.size, 2), ("sinks", self.sinks, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: give a whole number of at least {least}")
        if self.size % 2:
            raise ValueError(f"window={self.size}: give an even number, for two blocks")
        if self.sinks > self.block:
            raise ValueError(f"sinks={self.sinks}: give at most half of window={self.size}")

    @property
    def block(self) -> int:
        return self.size // 2

    @property
    def most_positions(self) -> int:
        """How many positions a base needs."""
        return self.size + self.sinks

    def slots(self, position: int) -> int:
        """Keys held after `position` tokens; also the position that the next token gets."""
        within_two_blocks = position < self.size
        return position if within_two_blocks else self.sinks + self.block + position % self.block

    def room(self, position: int) -> int:
        """Tokens until keys move next: at the end of the second block, or of any later one."""
        return self.size - position if position < self.size else self.block - position % self.block

    def distance(self, position: int) -> int | None:
        """How far the keys of the block that ends at this position move; None if no block ends."""
        if position % self.block or position < self.size:
            return None
        return self.sinks - self.block if position == self.size else -self.block

    def kept(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of x (rows, heads, slots, head_dim) at the end of a block: the sinks, and that block."""
        return x[:, :, : self.sinks], x[:, :, x.shape[2] - self.block :]


def together(states: Sequence[WindowState]) -> WindowState:
    """Rows of several states, one after the other; zeros in the unused slots of a row."""
    slots = max(state.slots for state in states)

    def join(parts: Sequence[Tensor]) -> Tensor:
        padded = [
            x if x.shape[2] == slots else torch.nn.functional.pad(x, (0, 0, 0, slots - x.shape[2]))
            for x in parts
        ]
        return torch.cat(padded)

    keys, values = (
        tuple(join(parts) for parts in zip(*layers, strict=True))
        for layers in ([s.keys for s in states], [s.values for s in states])
    )
    return WindowState(keys, values, torch.cat([state.position for state in states]))


def aligned_right(rows: Sequence[Tensor]) -> Tensor:
    """Keys or values (1, heads, slots, head_dim) of rows, side by side; zeros before those that are fewer."""
    slots = max(x.shape[2] for x in rows)
    return torch.cat([torch.nn.functional.pad(x, (0, 0, slots - x.shape[2], 0)) for x in rows])
