"""A stretch of tokens in pieces, none of which reaches beyond a segment of its row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from titans.memory.chunkwise.columns import Columns, common_phase, cut
from titans.nn.packing import ALL_REAL, Packed

# (batch,) bool, True for all rows, None for none.
Rows = Tensor | Literal[True] | None


class Piece(NamedTuple):
    """At most one segment of every row.

    packed: its tokens. begins, ends: rows whose segment begins with it, and ends with it. fresh: rows that a
    reset precedes.
    """

    packed: Packed
    begins: Rows
    ends: Rows
    fresh: Tensor | None = None


class Pieces(NamedTuple):
    """A stretch in pieces.

    apart: takes (batch, time, ...) to one tensor for each piece; where a piece holds no real token, there may
    be any. together: takes these, side by side, back, with zeros where no token is real. fresh_after:
    (batch,) bool, rows that a reset follows; None without any.
    """

    pieces: list[Piece]
    apart: Callable[[Tensor], Sequence[Tensor]]
    together: Callable[[Tensor], Tensor]
    fresh_after: Tensor | None = None


def cut_pieces(
    position: Tensor, time: int, packed: Packed, segment_length: int, reset: Tensor | None = None
) -> Pieces:
    """Cut a stretch where segments end, which are counted from the start of a text.

    position: (batch,) int64, before the stretch. reset: (batch, time) bool, of the packed rows.
    """
    if time == 1 and reset is None and packed.lengths is None:
        return _single(position, segment_length)
    parts = cut(position, time, segment_length, packed.real, reset)
    if isinstance(parts, Columns):
        counts, width = parts.filled.sum(-1), parts.filled.shape[-1]
        starts = (parts.start == 0) & (counts > 0)
        fresh = [None] * parts.filled.shape[1] if reset is None else parts.fresh.unbind(1)
        tokens = [Packed.first(count, width) for count in counts.unbind(1)]
        pieces = [*map(Piece, tokens, starts.unbind(1), parts.complete.unbind(1), fresh)]
        after = None if reset is None else parts.fresh_after
        if not pieces:
            return Pieces([], lambda x: [], parts.put_back, after)
        return Pieces(pieces, lambda x: parts.gather(x).split(width, 1), parts.put_back, after)
    segments = [run for run in parts for _ in range(run.count)]
    widths = [run.width for run in segments]
    pieces = [Piece(ALL_REAL, run.begins or None, run.complete or None) for run in segments]
    return Pieces(pieces, lambda x: x.split(widths, 1), lambda y: y)


def _single(position: Tensor, segment_length: int) -> Pieces:
    """One token of every row: one piece, wherever the rows stand."""

    def where(place: Tensor) -> Rows:
        phase = common_phase(place, segment_length)
        return place % segment_length == 0 if phase is None else True if phase == 0 else None

    return Pieces([Piece(ALL_REAL, where(position), where(position + 1))], lambda x: [x], lambda y: y)
