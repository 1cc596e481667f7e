"""What a memory holds, in numbers, and which weights it belongs to: in a session or in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.utils import _pytree as pytree

from titans.hf import GraftCache, TitansCache, TitansConfig, TitansForCausalLM
from titans.hf.cache import saved_sizes
from titans.hf.causal_cache import saved_model
from titans.hf.fingerprint import gathered, weights_name
from titans.hf.graft.memories import MEMORIES
from titans.hf.state_file import StateFile, damaged_header, open_state_file
from titans.memory import MemoryState
from titans.nn import NeuralMemory, NeuralMemoryState
from titans.state import State
from titans.stream.model import unwrapped
from titans.stream.reader import initial_states


@dataclass(frozen=True)
class LayerStats:
    """Frobenius norms over all heads and matrices of one layer's memory, or of one memory of a graft.

    weight_norm, momentum_norm: of the fast weights and of their momentum. change: how far the network has
    moved from that of a fresh session, ‖W − W_0‖ / ‖W_0‖; None where the model is not at hand or W_0
    is 0.
    """

    weight_norm: float
    momentum_norm: float
    change: float | None


@dataclass(frozen=True)
class SessionStats:
    """tokens: taken in so far. state_bytes: held by all states. layers: one entry for each memory layer.

    mean_surprise: of all that was fed, over tokens, layers and heads; None where nothing is known of it.
    tokens_per_second: of what was fed in this process; None before.
    """

    tokens: int
    state_bytes: int
    layers: tuple[LayerStats, ...]
    mean_surprise: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class MemoryFile:
    """What a saved memory contains: the sizes it belongs to, the weights' fingerprint, its statistics."""

    config: dict[str, Any]
    fingerprint: str | None
    stats: SessionStats


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
        config, num_columns = saved_model(file)
        recent = recent_tokens(path, file.about, None)
        total, count = surprise_so_far(path, file.about)
        if "model_type" in config:
            tensors = file.tensors().values()
            stats = SessionStats(
                num_columns + bool(recent), sum(t.numel() * t.element_size() for t in tensors), ()
            )
        else:
            sizes = _saved_config(file)
            stats = stats_of(TitansCache.from_file(file, sizes), num_columns + bool(recent), None)
        return MemoryFile(
            config,
            file.about.get("fingerprint"),
            replace(stats, mean_surprise=total / count if count else None),
        )


def _saved_config(file: StateFile) -> TitansConfig:
    config, _ = saved_sizes(file)
    try:
        return TitansConfig(**config)
    except (TypeError, ValueError, StrictDataclassError):
        raise damaged_header(file.path) from None


def recent_tokens(path: str | Path, about: dict[str, str], vocab_size: int | None) -> tuple[int, ...]:
    """The last tokens a session had taken in, from a file's header; ValueError where they are no ids."""
    try:
        recent = json.loads(about.get("recent_tokens", "[]"))
        if all(isinstance(t, int) and 0 <= t < (vocab_size or math.inf) for t in recent):
            return tuple(recent)
    except (ValueError, TypeError, RecursionError):
        pass
    raise ValueError(f"{path} has a damaged header: its recent_tokens are not ids of this model")


def surprise_so_far(path: str | Path, about: dict[str, str]) -> tuple[float, int]:
    """The sum of a session's surprise and of how many it is, from a file's header."""
    try:
        total, count = json.loads(about.get("surprise", "[0.0, 0]"))
        if isinstance(count, int) and count >= 0 and math.isfinite(float(total)):
            return float(total), count
    except (ValueError, TypeError, RecursionError, OverflowError):
        pass
    raise ValueError(f"{path} has a damaged header: its surprise must be [sum, count]")


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
