"""A stretch of tokens, cut where shards begin, and the parts side by side in the batch: no shard needs to
wait for the one before it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from titans.memory.chunkwise.columns import Columns, Run, cut
from titans.nn.packing import take
from titans.state import State, map_state, where_rows


class Parts(NamedTuple):
    """Parts of shards of one width, `count` of every row: row b's are rows b · count … of what is folded.

    fold: (batch, time, ...) to (batch · count, width, ...).
    real: (batch · count, width) bool, which of these are tokens; None where all are.
    begins: (batch · count,) bool, which parts begin a shard; one bool where it is the same for all. No other
        part than a row's first goes on with a shard.
    newest: (batch,) which part of a row is the last with a token in it; None where it is the last of all.
    idle: (batch,) bool, rows without a token; None where there are none.
    """

    count: int
    fold: Callable[[Tensor], Tensor]
    real: Tensor | None
    begins: Tensor | bool
    newest: Tensor | None = None
    idle: Tensor | None = None

    def enter(self, running: State, fresh: Callable[[int], State]) -> State:
        """The states with which the parts begin; running: of the rows; fresh: of so many that begin."""
        if self.begins is False:
            return running
        rows = self.count * _rows(running)
        if self.begins is True:
            return fresh(rows)
        spread = map_state(lambda x: x.repeat_interleave(self.count, 0), running)
        return where_rows(self.begins, fresh(rows), spread)

    def leave(self, ended: State, running: State) -> State:
        """The rows' states afterwards, from those in which the parts end and the rows' before."""
        batch = _rows(running)

        def newest(x: Tensor) -> Tensor:
            by_row = x.unflatten(0, (batch, self.count))
            # Not a view: a state must not keep those of all shards alive.
            return by_row[:, -1].clone() if self.newest is None else take(by_row, self.newest[:, None])[:, 0]

        left = ended if self.count == 1 else map_state(newest, ended)
        return left if self.idle is None else where_rows(self.idle, running, left)


class Shards(NamedTuple):
    """parts: one after the other. together: takes what is folded, one for each, back to (batch, time, ...).

    fresh_after: (batch,) bool, rows that a reset follows; None without any.
    """

    parts: list[Parts]
    together: Callable[[list[Tensor]], Tensor]
    fresh_after: Tensor | None = None


def _rows(state: object) -> int:
    return next(x for x in torch.utils._pytree.tree_leaves(state) if isinstance(x, Tensor)).shape[0]


def cut_shards(
    position: Tensor, time: int, real: Tensor | None, reset: Tensor | None, shard_length: int
) -> Shards:
    """Cut a stretch at every shard_length tokens of a text; the arguments as in `cut`.

    Where all rows stand at the same place of a shard: what is left of it, whole shards all at once, the rest.
    Otherwise all parts at once, those of other lengths filled up.
    """
    batch = len(position)
    cuts = cut(position, time, shard_length, real, reset)
    if isinstance(cuts, Columns):
        return _ragged(cuts, reset is not None)

    def fold(x: Tensor, run: Run) -> Tensor:
        return x[:, run.begin : run.end].reshape(batch * run.count, run.width, *x.shape[2:])

    parts = [Parts(run.count, partial(fold, run=run), None, run.begins) for run in cuts]
    return Shards(parts, lambda ys: torch.cat([y.reshape(batch, -1, *y.shape[2:]) for y in ys], 1))


def _ragged(columns: Columns, resets: bool) -> Shards:
    batch, count, width = columns.filled.shape
    used = columns.filled.any(-1).sum(1)
    parts = Parts(
        count,
        lambda x: columns.gather(x).reshape(batch * count, width, *x.shape[2:]),
        columns.filled.flatten(0, 1),
        (columns.start == 0).flatten(),
        newest=(used - 1).clamp_min(0),
        idle=used == 0,
    )

    def together(ys: list[Tensor]) -> Tensor:
        return columns.put_back(ys[0].reshape(batch, count * width, *ys[0].shape[2:]))

    return Shards([parts] if count else [], together, columns.fresh_after if resets else None)
