"""Any state of this library as transformers' `Cache`: rows selected, repeated and copied; columns counted."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, CacheLayerMixin

from titans.hf.state_file import StateFile, damaged_header, write_state_file
from titans.state import expanded, map_state, state_nbytes

Own = TypeVar("Own", bound="StateCache")
NUM_NEWEST = 16
LOAD_WITH_ITS_OWN = "load it with the model it was made with"


@dataclass
class _Columns:
    """How many a cache and all its layers have seen, and of these before the present call of `generate`."""

    seen: int = 0
    before_call: int = 0


class StateCacheLayer(CacheLayerMixin):
    """One state, or None before the first token.

    It does not know its cache: two that know each other stay in memory until Python looks for cycles.
    """

    def __init__(self, columns: _Columns) -> None:
        super().__init__()
        self.columns = columns
        self.state: Any = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The model makes its own first state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("a cache of whole states is filled by the model, not by update()")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns.seen - self.columns.before_call

    def get_max_length(self) -> int:
        return -1


class StateCache(Cache):
    """Everything a model has read, as states.

    It can be reordered, repeated, selected, reset, copied (`clone`) and saved; it cannot be cropped, because
    what a memory has learned cannot be unlearned.

    Args:
        config: of the model, with a method `state_fields`: the fields, as JSON has them, that two models must
            share to understand each other's states.
        num_states: how many it holds.
    """

    layers: list[StateCacheLayer]

    def __init__(self, config: Any, num_states: int) -> None:
        self._columns = _Columns()
        super().__init__(layers=[StateCacheLayer(self._columns) for _ in range(num_states)])
        self.config = config
        self._newest_ids: Tensor | None = None
        # Of the present call of `generate`: (batch,) bool, rows that are padded from here on.
        self.ended_rows: Tensor | None = None

    @property
    def num_columns(self) -> int:
        """Tokens seen, padding included."""
        return self._columns.seen

    @property
    def states(self) -> tuple[Any, ...] | None:
        """The states, or None before the first token."""
        states = tuple(layer.state for layer in self.layers)
        return None if states[0] is None else states

    def store(self, states: tuple[Any, ...], num_columns: int, ids: Tensor | None = None) -> None:
        """Keep what the model returned for a stretch of `num_columns` tokens, padding included.

        The newest of its ids (batch, num_columns) are kept, too, if given: see `is_beginning_of`.
        """
        for layer, state in zip(self.layers, states, strict=True):
            # Without autograd there is nothing to detach, and a map over states takes as long as a layer.
            layer.state = map_state(Tensor.detach, state) if torch.is_grad_enabled() else state
        if num_columns:
            known = None if self.num_columns and self._newest_ids is None else ids
            parts = [x for x in (self._newest_ids, known) if x is not None]
            self._newest_ids = None if known is None else _newest(torch.cat(parts, 1))
        self._columns.seen += num_columns

    def is_beginning_of(self, ids: Tensor) -> bool:
        """Whether ids (batch, time) repeat what was seen, as far as the kept ids show, and continue it."""
        newest, seen = self._newest_ids, self.num_columns
        if newest is None or ids.shape[1] <= seen or ids.shape[0] != newest.shape[0]:
            return False
        return torch.equal(ids[:, seen - newest.shape[1] : seen].to(newest.device), newest)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included, since `begin_call` (or ever)."""
        return self.layers[layer_idx].get_seq_length()

    def begin_call(self, fresh: bool) -> None:
        """Count columns from here (fresh) or from the start: `generate` slices ids and masks by the count."""
        self._columns.before_call = self.num_columns if fresh else 0

    def _map(self, function: Any) -> None:
        for layer in self.layers:
            layer.state = map_state(function, layer.state)
        self._newest_ids = None if self._newest_ids is None else function(self._newest_ids)

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.state = None
        self._columns.seen = self._columns.before_call = 0
        self._newest_ids = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise ValueError(
            f"crop({tokens_to_remove}): a memory cannot unlearn its last tokens; clone() before reading them"
        )

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def batch_size(self) -> int:
        """Rows held, or −1 before the first token."""
        first = next(iter(pytree.tree_iter(self.layers[0].state)), None)
        return -1 if first is None else first.shape[0]

    def check_rows(self, batch: int) -> None:
        """Raise ValueError if what is held has another number of rows than an input."""
        if (held := self.batch_size) not in (-1, batch):
            raise ValueError(
                f"past_key_values holds {held} rows, the input has {batch}: repeat or select its rows first"
            )

    def nbytes(self) -> int:
        """Bytes held by all states."""
        return state_nbytes(self.states)

    def check_fits(self, config: Any) -> None:
        """Whether a model of this configuration understands the states.

        Raises:
            ValueError: naming the first field that differs.
        """
        if config is self.config:
            return
        if found := first_difference(self.config.state_fields(), config.state_fields()):
            raise ValueError(
                f"the cache was made with {found.name}={found.theirs!r}, the model has {found.ours!r}: use "
                "the model it was made with"
            )

    def clone(self: Own) -> Own:
        """An independent copy: both may go on reading."""
        return copy.deepcopy(self)

    def __deepcopy__(self: Own, memo: dict[int, Any]) -> Own:
        other = type(self)(self.config)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            # States are never written in place, so sharing them is copying them.
            theirs.state = mine.state
        other._columns.seen, other._newest_ids = self.num_columns, self._newest_ids
        return other

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Write the states to one safetensors file, through a temporary name.

        Raises:
            ValueError: before the first token.
        """
        if self.states is None:
            raise ValueError("the cache is empty: read something before saving it")
        positions = next(leaf for name, leaf in named_leaves(self.states) if name.endswith("position"))
        about = {
            **(metadata or {}),
            "config": json.dumps(self.config.state_fields()),
            "num_columns": str(self.num_columns),
            "tokens_per_row": json.dumps(positions.tolist()),
            "newest_ids": json.dumps(None if self._newest_ids is None else self._newest_ids.tolist()),
        }
        write_state_file(Path(path), dict(named_leaves(self.states)), about)


def _newest(ids: Tensor) -> Tensor:
    # A copy: a view would keep a whole prompt alive.
    return ids if ids.shape[1] <= NUM_NEWEST else ids[:, -NUM_NEWEST:].clone()


def saved_ids(file: StateFile, rows: int, vocab_size: int) -> Tensor | None:
    """The newest ids that a file's cache had seen, or None where it does not say.

    Raises:
        ValueError: if they are no ids of this model.
    """
    try:
        ids = json.loads(file.about.get("newest_ids", "null"))
        if ids is None:
            return None
        found = torch.tensor(ids, dtype=torch.int64)
        if (
            found.shape == (rows, min(found.shape[-1], NUM_NEWEST))
            and ((found >= 0) & (found < vocab_size)).all()
        ):
            return found
    except (TypeError, ValueError, RuntimeError, RecursionError, OverflowError):
        pass
    raise damaged_header(file.path)


class Difference(NamedTuple):
    """A field in which two states mean something else; `name` is dotted inside the memory's fields."""

    name: str
    theirs: Any
    ours: Any


def first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> Difference | None:
    """The first of `state_fields` in which two states differ, or None."""
    for name, own in ours.items():
        other = theirs.get(name)
        if isinstance(own, dict) and isinstance(other, dict):
            if inner := first_difference(other, own):
                return inner._replace(name=f"{name}.{inner.name}")
        elif own != other:
            return Difference(name, other, own)
    unknown = next(iter(theirs.keys() - ours.keys()), None)
    return None if unknown is None else Difference(unknown, theirs[unknown], None)


def check_writer(
    path: Path, theirs: dict[str, Any], ours: dict[str, Any], remedy: str = LOAD_WITH_ITS_OWN
) -> None:
    """Whether a file was written by a model whose states mean the same.

    theirs, ours: `state_fields` of the model that wrote it, and of the one that loads it. remedy: what to do.

    Raises:
        ValueError: naming the two kinds of model, or the first field that differs.
    """
    if (writer := _kind(theirs)) != (own := _kind(ours)):
        raise ValueError(f"{path} was written by {writer}, and this is {own}: {remedy}")
    if found := first_difference(theirs, ours):
        raise ValueError(
            f"{path} was written with {found.name}={found.theirs!r}, the model has {found.ours!r}: {remedy}"
        )


def _kind(fields: dict[str, Any]) -> str:
    if (kind := fields.get("model_type")) is None:
        return "a Titans model"
    return "a graft" if kind == "titans-graft" else f"a model of type {kind!r} without a memory"


def named_leaves(states: Any) -> list[tuple[str, Tensor]]:
    # Anchors have their names in a file even where they are the weights.
    pairs, _ = pytree.tree_flatten_with_path(expanded(states))
    return [(pytree.keystr(path).lstrip("."), leaf) for path, leaf in pairs]
