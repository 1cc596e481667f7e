"""What a memory holds, in numbers, and which weights it belongs to: in a session or in a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.hf import GraftCache, TitansCache, TitansConfig, TitansForCausalLM
from titans.hf.cache import saved_sizes
from titans.hf.fingerprint import gathered, weights_name
from titans.hf.graft.memories import MEMORIES
from titans.hf.memory_sentence import memory_sentence
from titans.hf.state_file import StateFile, damaged_header, open_state_file
from titans.memory import MemoryState
from titans.memory_file import (
    LayerStats,
    MemoryFile,
    SessionStats,
    as_summary,
    recent_tokens,
    saved_model,
    surprise_so_far,
)
from titans.nn import NeuralMemory, NeuralMemoryState
from titans.state import State
from titans.stream.model import unwrapped
from titans.stream.reader import initial_states


def fingerprint(model: Any) -> str:
    """A short name for the weights of a model, which may be wrapped; see `weights_name`."""
    return weights_name(unwrapped(model))


def describe_memory(path: str | Path) -> MemoryFile:
    """What a memory file contains, without the model it belongs to.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        ValueError: if it is damaged.
    """
    with open_state_file(path) as file:
        config, num_columns = saved_model(file.header)
        tokens = num_columns + bool(recent_tokens(path, file.about, None))
        total, count = surprise_so_far(path, file.about)
        if "model_type" in config:
            stats = SessionStats(
                tokens, sum(x.numel() * x.element_size() for x in file.tensors().values()), ()
            )
        else:
            stats = stats_of(TitansCache.from_file(file, _saved_config(file)), tokens, None)
        stats = replace(stats, mean_surprise=total / count if count else None)
        return MemoryFile(config, file.about.get("fingerprint"), stats)


def summary_of(cache: Any, tokens: int) -> dict[str, str]:
    """An entry of a file's header, for `read_summary`; none where the tensors do not describe it."""
    if not isinstance(cache, TitansCache):
        return {}
    fields = cache.config.state_fields()
    sentence = memory_sentence(fields) if fields.get("memory") else None
    return {"summary": as_summary(stats_of(cache, tokens, None), sentence)}


def _saved_config(file: StateFile) -> TitansConfig:
    config, _ = saved_sizes(file)
    try:
        return TitansConfig(**config)
    except (TypeError, ValueError, StrictDataclassError):
        raise damaged_header(file.path) from None


def find_states(kind: type[State], states: object) -> list[State]:
    """The states of one kind inside those of all blocks, in the order of the layers."""
    leaves = pytree.tree_leaves(states, is_leaf=lambda x: isinstance(x, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def carried_memories(states: object) -> list[MemoryState]:
    """What each layer has learned and carries along; not what memories hold that begin anew with a shard."""
    return [state.memory for state in find_states(NeuralMemoryState, states)]


def graft_stats(cache: GraftCache) -> tuple[LayerStats, ...]:
    """The norms of the fast weights of a graft's memories, in the order of `MEMORIES`."""
    states = {} if cache.state is None else cache.state.memories
    return tuple(
        LayerStats(_norm(weights), _norm(momentum), None)
        for name, state in states.items()
        for weights, momentum in MEMORIES[name].fast_weights(state)
    )


@torch.no_grad()
def stats_of(cache: TitansCache, tokens: int, model: TitansForCausalLM | None) -> SessionStats:
    """Statistics of a cache of one row; without the model nothing is known of a fresh one."""

    initial = None if model is None else initial_states(model)
    now = carried_memories(cache.states or initial)
    modules = [] if model is None else list(model.modules())
    changes: list[float | None] = [None] * len(now)
    learners = [module for module in modules if isinstance(module, NeuralMemory)]
    for index, (learner, fresh) in enumerate(zip(learners, carried_memories(initial), strict=True)):
        difference = [w - w_0 for w, w_0 in zip(now[index].weights, fresh.weights, strict=True)]
        base = None if learner.base is None else [gathered(weight) for weight in learner.base]
        length = _norm(learner.network.total(fresh.weights, base))
        changes[index] = _norm(difference) / length if length else None
    layers = (
        LayerStats(_norm(memory.weights), _norm(memory.momentum), change)
        for memory, change in zip(now, changes, strict=True)
    )
    return SessionStats(tokens, cache.nbytes(), tuple(layers))


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))
