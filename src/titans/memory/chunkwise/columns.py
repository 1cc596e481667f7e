"""Cutting a stretch where chunks end, or segments, or shards: one cutter for whatever is read in parts.

Rows that stand at the same place are cut into runs of equal parts, others into columns: at most one part of
each row in every column.
"""

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


class Run(NamedTuple):
    """`count` parts of equal width that follow one another, of every row: tokens `begin` to `end`.

    begins: whether the first token begins a chunk. complete: whether the last token closes one.
    """

    begin: int
    end: int
    count: int
    begins: bool
    complete: bool

    @property
    def width(self) -> int:
        return (self.end - self.begin) // self.count


class Columns(NamedTuple):
    """A stretch of tokens, cut per row at chunk boundaries and resets, the tokens of a column packed to its
    left.

    real: (batch, time) bool, tokens that are read.
    source: (batch, columns, width) index into the stretch of the token in each slot (0 in empty slots).
    filled: (batch, columns, width) bool.
    start: (batch, columns) index within its chunk of a column's first token.
    fresh: (batch, columns) bool, a reset precedes the column.
    complete: (batch, columns) bool, the column's last token closes its chunk.
    place: (batch, time) slot of each token, counted through the columns (0 for masked tokens).
    fresh_after: (batch,) bool, a reset follows the row's last real token.
    position: (batch,) position after the stretch.
    """

    real: Tensor
    source: Tensor
    filled: Tensor
    start: Tensor
    fresh: Tensor
    complete: Tensor
    place: Tensor
    fresh_after: Tensor
    position: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """(batch, time, ...) to (batch, columns · width, ...); in an empty slot is some token of the row."""
        return take(x, self.source.flatten(1))

    def put_back(self, y: Tensor) -> Tensor:
        """(batch, columns · width, ...) to (batch, time, ...), zeros where no token is read."""
        y = take(y, self.place)
        return torch.where(self.real.view(self.real.shape + (1,) * (y.dim() - 2)), y, 0)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]] for x (batch, time, ...) and index (batch, count): (batch, count, ...)."""
    index = index.view(index.shape + (1,) * (x.dim() - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def cut(
    position: Tensor, time: int, size: int, real: Tensor | None = None, reset: Tensor | None = None
) -> list[Run] | Columns:
    """Cut a stretch at every `size` tokens of its rows.

    Where all tokens are real, there is no reset and all rows stand at the same place of a chunk: runs, namely
    what is left of the running chunk, whole chunks, and the rest. Otherwise columns.

    Args:
        position: (batch,) int64, before the stretch.
        real, reset: (batch, time) bool, or None for all and for no token.
    """
    if real is None and reset is None and (phase := common_phase(position, size)) is not None:
        head = min(-phase % size, time)
        body = head + (time - head) // size * size
        spans = (0, head, 1), (head, body, (body - head) // size), (body, time, 1)
        return [
            Run(begin, end, count, (phase + begin) % size == 0, (phase + end) % size == 0)
            for begin, end, count in spans
            if begin < end
        ]
    if real is None:
        real = torch.ones(len(position), time, dtype=torch.bool, device=position.device)
    return cut_columns(position, real, size, reset)


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
        real,
        source.view(batch, num_columns, width),
        filled,
        start,
        fresh,
        complete,
        torch.where(real, place, 0),
        fresh_after=(last == count),
        position=torch.where(last >= 0, count - last, position + count),
    )
