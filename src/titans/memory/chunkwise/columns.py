"""Cutting ragged rows into columns: at most one chunk (or segment) of each row in every column."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from titans.memory.checks import has_no_values

_aligned: ContextVar[bool] = ContextVar("aligned", default=False)


@contextmanager
def assume_aligned() -> Iterator[None]:
    """Within it every row is taken to stand where a chunk, and a segment, begins, without a look at it.

    To look, the host has to wait for the device, which it cannot while a CUDA graph is recorded. Whoever says
    this answers for it: rows that stand elsewhere would be cut in the wrong places.
    """
    token = _aligned.set(True)
    try:
        yield
    finally:
        _aligned.reset(token)


def common_phase(position: Tensor, size: int) -> int | None:
    """position % size, (batch,), where it is the same in every row, or None. Reads it on the host; where
    there are no values, as in a compiled graph, it is None."""
    if torch.compiler.is_compiling() or has_no_values(position):
        return None
    if _aligned.get():
        return 0
    phases = set((position % size).tolist())
    return phases.pop() if len(phases) == 1 else None


class Columns(NamedTuple):
    """A stretch of tokens, cut per row at chunk boundaries and resets, the tokens of a column packed to its
    left.

    source: (batch, columns, width) index into the stretch of the token in each slot (0 in empty slots).
    filled: (batch, columns, width) bool.
    start: (batch, columns) index within its chunk of a column's first token.
    fresh: (batch, columns) bool, a reset precedes the column.
    complete: (batch, columns) bool, the column's last token closes its chunk.
    place: (batch, time) slot of each token, counted through the columns (0 for masked tokens).
    fresh_after: (batch,) bool, a reset follows the row's last real token.
    position: (batch,) position after the stretch.
    """

    source: Tensor
    filled: Tensor
    start: Tensor
    fresh: Tensor
    complete: Tensor
    place: Tensor
    fresh_after: Tensor
    position: Tensor


def cut_columns(position: Tensor, real: Tensor, chunk_size: int, reset: Tensor | None = None) -> Columns:
    """Lay out a stretch; position (batch,) before it, real and reset (batch, time) bool. Reads sizes on the
    host, or without `reset` in a compiled graph, and where there are no values, takes the largest."""
    batch, time = real.shape
    count = real.sum(1)
    rank = real.cumsum(1) - real.long()
    since = torch.full_like(rank, -1)
    if reset is not None:
        since = torch.where(reset, rank, since).cummax(1).values
    token_position = torch.where(since >= 0, rank - since, position[:, None] + rank)
    opens = real & ((token_position % chunk_size == 0) | (rank == 0))
    column = opens.cumsum(1) - 1
    slot = rank - torch.where(opens, rank, -1).cummax(1).values

    if (torch.compiler.is_compiling() and reset is None) or has_no_values(real):
        num_columns, width = (time + 2 * chunk_size - 2) // chunk_size, min(time, chunk_size)
    else:
        num_columns = int(torch.where(real, column, -1).max()) + 1 if real.numel() else 0
        width = int(torch.where(real, slot, -1).max()) + 1 if real.numel() else 0
    place = torch.where(real, column * width + slot, num_columns * width)
    spill = num_columns * width + 1

    def scatter(values: Tensor, index: Tensor, size: int) -> Tensor:
        return values.new_zeros(batch, size).scatter(1, index, values)[:, :-1]

    source = scatter(torch.arange(time, device=real.device).expand(batch, time), place, spill)
    filled = scatter(real, place, spill).view(batch, num_columns, width)
    opening = torch.where(opens, column, num_columns)
    start = scatter(token_position % chunk_size, opening, num_columns + 1)
    fresh = scatter(since == rank, opening, num_columns + 1)
    complete = start + filled.sum(-1) == chunk_size
    last = since[:, -1] if time else torch.full_like(position, -1)
    return Columns(
        source.view(batch, num_columns, width),
        filled,
        start,
        fresh,
        complete,
        torch.where(real, place, 0),
        fresh_after=(last == count),
        position=torch.where(last >= 0, count - last, position + count),
    )
