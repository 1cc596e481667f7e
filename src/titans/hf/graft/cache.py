"""The state of a graft: the window's keys and values, and the fast weights of its memories."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.hf.causal_cache import converted
from titans.hf.graft.configuration import GraftConfig
from titans.hf.graft.memories import MEMORIES
from titans.hf.graft.window import Window, WindowState, together
from titans.hf.state_cache import StateCache, check_writer, named_leaves, saved_ids
from titans.hf.state_file import StateFile, damaged_header
from titans.memory_file import saved_model
from titans.state import compact, expanded, map_state, stacked


@dataclass(frozen=True)
class GraftState:
    """The state of all rows: of the window, and by name of each memory that the graft has.

    A memory's state is also an attribute of this name, None if the graft has none.
    """

    window: WindowState
    memories: Mapping[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if name in MEMORIES:
            return self.memories.get(name)
        raise AttributeError(f"a graft's state has no {name}")

    def row(self, index: int, config: GraftConfig) -> GraftState:
        """One row alone, as in a batch of one."""
        slots = Window(config.window, config.sinks).slots(int(self.window.position[index]))
        memories = {name: map_state(lambda x: x[[index]], state) for name, state in self.memories.items()}
        return GraftState(self.window.row(index, slots), memories)

    @staticmethod
    def joined(states: Sequence[GraftState]) -> GraftState:
        """Rows of several states of one graft, one after the other."""
        memories = stacked([state.memories for state in states])
        return GraftState(together([state.window for state in states]), memories)


def _flatten(state: GraftState) -> tuple[list[Any], tuple[str, ...]]:
    return [state.window, *state.memories.values()], tuple(state.memories)


def _flatten_with_keys(state: GraftState) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    parts, names = _flatten(state)
    keys = [pytree.GetAttrKey(name) for name in ("window", *names)]
    return list(zip(keys, parts, strict=True)), names


def _unflatten(parts: Iterable[Any], names: tuple[str, ...]) -> GraftState:
    window, *states = parts
    return GraftState(window, dict(zip(names, states, strict=True)))


# A memory's tensors have its name in a file, as if it were a field.
pytree.register_pytree_node(
    GraftState, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="titans.hf.graft.GraftState",
)  # fmt: skip


class GraftCache(StateCache):
    """The state of a graft as a cache of transformers.

    It can be copied, selected, repeated and saved; it cannot be cropped.
    """

    def __init__(self, config: GraftConfig) -> None:
        super().__init__(config, 1)

    @property
    def state(self) -> GraftState | None:
        """The state, or None before the first token."""
        return None if self.states is None else self.states[0]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.layers[0].state = compact(self.layers[0].state)
        self._drop_unused_slots()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._drop_unused_slots()

    def _drop_unused_slots(self) -> None:
        """Keep no more slots than the rows need, so that each row holds the same as in a batch of one."""
        if (state := self.state) is None or not len(state.window.position):
            return
        window = Window(self.config.window, self.config.sinks)
        slots = max(map(window.slots, state.window.position.tolist()))
        if slots < state.window.slots:
            keys, values = (
                tuple(x[:, :, :slots].clone() for x in layers)
                for layers in (state.window.keys, state.window.values)
            )
            self.layers[0].state = replace(state, window=WindowState(keys, values, state.window.position))

    @classmethod
    def from_file(cls, file: StateFile, config: GraftConfig, template: GraftState) -> GraftCache:
        """The cache that `save` wrote, in the precision and on the device of a template.

        Args:
            template: the initial state of one row, of the model that will use the cache.

        Raises:
            ValueError: for a damaged file, the memory of another model, or values that no model could have
                written; the message names which.
        """
        saved, num_columns = saved_model(file.header)
        check_writer(file.path, saved, config.state_fields())
        wanted = dict(named_leaves((template,)))
        if different := sorted(wanted.keys() ^ file.kinds.keys()):
            raise ValueError(
                f"{file.path} does not hold exactly the tensors of such a model: {different[0]} differs"
            )
        tensors = file.tensors()
        _check(file.path, tensors, wanted, config, num_columns)
        leaves = [converted(file.path, name, tensors[name], like) for name, like in wanted.items()]
        cache = cls(config)
        structure = pytree.tree_structure(expanded((template,)))
        cache.store(compact(pytree.tree_unflatten(leaves, structure)), num_columns)
        cache._newest_ids = saved_ids(file, cache.batch_size, config.vocab_size)
        return cache


def _check(
    path: Path, tensors: dict[str, Tensor], wanted: dict[str, Tensor], config: GraftConfig, num_columns: int
) -> None:
    """Raise ValueError for tensors that no model with such states could have written."""
    window = Window(config.window, config.sinks)
    limits = {
        f"[0].{name}.{number}": least_and_most
        for name, memory in MEMORIES.items()
        for number, least_and_most in memory.limits(config.vocab_size).items()
    }
    position = tensors["[0].window.position"]
    if position.dim() != 1 or position.dtype != torch.int64 or not len(position):
        raise damaged_header(path)
    if (position < 0).any() or (position > num_columns).any():
        raise ValueError(f"{path}: its positions contradict its length; the memory is damaged")
    for learned in (tensor for name, tensor in tensors.items() if name.endswith(".position")):
        if learned.shape != position.shape or (learned < 0).any() or (learned > position).any():
            raise ValueError(f"{path}: its positions contradict each other; the memory is damaged")
    slots = max(map(window.slots, position.tolist()))
    for name, tensor in tensors.items():
        like = wanted[name]
        shape = [len(position), *like.shape[1:]]
        if ".window.keys" in name or ".window.values" in name:
            shape[2] = slots
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, the model needs {tuple(shape)}"
            )
        if tensor.is_floating_point() != like.is_floating_point():
            raise ValueError(f"{path}: {name} has dtype {tensor.dtype}, the model needs {like.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values; the memory is damaged")
        least, most = limits.get(name, (-math.inf, math.inf))
        if not ((tensor >= least) & (tensor <= most)).all():
            raise ValueError(f"{path}: {name} holds values that no text gives; the memory is damaged")
