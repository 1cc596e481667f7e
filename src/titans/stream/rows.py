"""What several texts have left in a model, side by side in one cache: joined, selected, taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from titans.hf.graft.window import Window, WindowState
from titans.hf.graft.window import together as windows_together
from titans.memory import MemoryState
from titans.state import grows, map_state, stacked
from titans.stream.reader import GraftReader, StateReader, TitansReader, initial_states

_OWN_SIZE = (MemoryState, WindowState)


def can_share_calls(reader: object) -> bool:
    """Whether texts of different lengths can be read in one call: those of Titans models and grafts.

    Rows of other models would have to be padded, which corrupts recurrent states.
    """
    return isinstance(reader, StateReader)


def side_by_side(reader: StateReader, caches: Sequence[Any]) -> Any:
    """One cache with the rows of all, one after the other; it counts its columns from 0.

    Args:
        caches: of the reader, of any number of rows each; an empty one is a row that has read nothing.
    """
    joined = reader.start()
    fresh: Any = None
    if any(cache.states is None for cache in caches):
        fresh = (
            initial_states(reader.inner)
            if isinstance(reader, TitansReader)
            else (reader.inner.initial_state(1),)
        )
    states = [cache.states or fresh for cache in caches]
    if isinstance(reader, GraftReader):
        windows = windows_together([state.window for (state,) in states])
        # What else a graft holds has one size for all rows.
        rest = stacked([replace(state, window=None) for (state,) in states])
        joined.store((replace(rest, window=windows),), 0)
    else:
        joined.store(stacked(states), 0)
    return joined


def row_of(reader: StateReader, cache: Any, row: int) -> tuple[Any, ...]:
    """One row's states as it would hold them alone: nothing of the others is kept alive."""
    config = reader.inner.config

    def alone(state: Any) -> Any:
        if isinstance(state, WindowState):
            slots = Window(config.window, config.sinks).slots(int(state.position[row]))
            return map_state(Tensor.clone, state.row(row, slots))
        if not has_own_size(state):
            return state[[row]] if isinstance(state, Tensor) else state
        mine = map_state(lambda x: x[[row]], state)
        return mine.compact() if isinstance(mine, MemoryState) else mine.trimmed()

    def has_own_size(state: Any) -> bool:
        return isinstance(state, _OWN_SIZE) or grows(state)

    return tuple(pytree.tree_map(alone, cache.states, is_leaf=has_own_size))
