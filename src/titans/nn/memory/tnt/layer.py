"""One global memory of large chunks carried along the text, and local memories of small chunks that begin
anew with every shard of it, so that all shards are read in parallel (TNT, arXiv 2511.07343)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from titans.memory import MemoryState
from titans.nn.context import BlockContext, MemoryTrace
from titans.nn.memory.initial_weights import InitialWeights
from titans.nn.memory.layer import NeuralMemory, NeuralMemoryState
from titans.nn.memory.learner import Learner, Stretch
from titans.nn.memory.tnt.key_space import towards_keys
from titans.nn.memory.tnt.shards import cut_shards
from titans.state import register_state, where_rows


@register_state
@dataclass(frozen=True)
class ShardState:
    """What local memories carry, since the running shard began.

    memories: one each; their positions count as the global memory's do, which is the same place in a chunk,
    because a shard is whole chunks. key_sum: Σ k kᵀ of the shard's keys, (batch, heads, head_dim, head_dim).
    """

    memories: tuple[MemoryState, ...]
    key_sum: Tensor


@register_state
@dataclass(frozen=True)
class TNTMemoryState(NeuralMemoryState):
    """What a `TNTMemory` carries: `memory` is the global one, `local` those of the running shard."""

    local: ShardState


class LocalMemory(Learner):
    """A local memory of a `TNTMemory`: it takes that layer's vectors, with weights and gates of its own.

    Its step size has the same bound as the global one's, in units of what is safe for its chunk.
    """

    def __init__(self, layer: NeuralMemory, chunk_size: int) -> None:
        super().__init__(
            layer.input.in_features,
            layer.num_heads,
            layer.inner,
            chunk_size,
            layer.form,
            max_step_size=layer.max_step_size * layer.chunk_size / chunk_size,
            half_lives=layer.half_lives,
        )
        self.initial_weights = InitialWeights(self.network, self.num_heads, layer.initial_weights.empty)
        self.reset_parameters()


class TNTMemory(NeuralMemory):
    """A `NeuralMemory` in the TNT schedule: a global memory and local ones, whose reads are added.

    The global memory has large chunks and answers with the weights its running chunk began with, so no work
    grows with the square of the chunk. The local memories have small chunks; each begins every `shard_length`
    tokens with its own learned weights, so that whole shards are read side by side. They are asked with P_t
    q_t, the query in the space of the shard's keys so far, see `towards_keys`. All take the same queries,
    keys and values through the same feature map, each has gates of its own. Persistent tokens are written
    into the global memory; what a local one begins with is learned anyway. Surprise is the global memory's.

    Chunk sizes shape no parameter: the same weights go on with smaller local chunks, the second stage of TNT.

    Args:
        chunk_size: of the global memory.
        local_chunk_sizes: of the local memories, one for each.
        shard_length: tokens after which local memories begin anew, a multiple of their chunk sizes.
        form: its max_step_size is the global memory's; that of a local one is chunk_size / its own times as
            much.
        others: see `NeuralMemory`.

    Raises:
        ValueError: for sizes that are no whole numbers or do not divide, and as `NeuralMemory` does.
    """

    read_anchor = True
    state_type = TNTMemoryState

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int = 64,
        depth: int = 1,
        expansion: int = 4,
        chunk_size: int = 512,
        *,
        local_chunk_sizes: Sequence[int],
        shard_length: int,
        **others: Any,
    ) -> None:
        if (reason := refuses(local_chunk_sizes, shard_length)) is not None:
            raise ValueError(reason)
        super().__init__(hidden_size, num_heads, head_dim, depth, expansion, chunk_size, **others)
        self.shard_length = shard_length
        self.local = nn.ModuleList(LocalMemory(self, size) for size in local_chunk_sizes)

    def prior(self, queries: Tensor) -> Tensor | None:
        """What memories that have read nothing answer together.

        queries: (batch, time, 2 · heads, key_dim), what the global memory was asked, then what the local
        ones were. Returns (batch, time, heads, head_dim), or None as for a `NeuralMemory`.
        """
        own, asked = queries.chunk(2, 2)
        total = super().prior(own)
        for memory in self._locals():
            prior = memory.prior(asked)
            total = prior if total is None or prior is None else total + prior
        return total

    def _locals(self) -> list[LocalMemory]:
        return [memory for memory in self.local if isinstance(memory, LocalMemory)]

    def _fresh_shard(self, rows: int) -> ShardState:
        """With which a shard begins."""
        heads, head_dim = self.num_heads, self.network.head_dim
        memories = tuple(memory.empty_memory(rows) for memory in self._locals())
        return ShardState(memories, memories[0].weights[0].new_zeros(rows, heads, head_dim, head_dim))

    def _begin(self, tail: Tensor, memory: MemoryState) -> TNTMemoryState:
        return TNTMemoryState(tail, memory, self._fresh_shard(len(tail)))

    def _learn(
        self,
        stretch: Stretch,
        state: NeuralMemoryState,
        fresh: NeuralMemoryState | None,
        context: BlockContext,
    ) -> tuple[Tensor, Tensor, TNTMemoryState, MemoryTrace | None]:
        """See `NeuralMemory._learn`; the queries are those that `prior` takes."""
        reads, own, after, trace = super()._learn(stretch, state, fresh, context)
        assert isinstance(after, TNTMemoryState)
        local_reads, asked, local = self._scan_shards(
            stretch, state.memory.position, after.local, context.frozen
        )
        after = replace(after, local=_at(after.memory.position, local))
        return reads + local_reads, torch.cat([own, asked], 2), after, trace

    def _scan_shards(
        self, stretch: Stretch, position: Tensor, local: ShardState, frozen: bool
    ) -> tuple[Tensor, Tensor, ShardState]:
        """The sum of what the local memories answer, what they were asked, and their new state."""
        shards = cut_shards(position, stretch.x.shape[1], stretch.real, stretch.reset, self.shard_length)
        found, asked = [], []
        for parts in shards.parts:
            x, queries, keys, values = map(parts.fold, stretch[:4])
            written = keys if stretch.written is stretch.keys else parts.fold(stretch.written)
            known = parts.enter(local, self._fresh_shard)
            seen, key_sum = towards_keys(queries, keys, known.key_sum, parts.real)
            mapped = self.feature_map(seen)
            folded = Stretch(x, seen, keys, values, mapped, written, parts.real, None)
            reads, memories = torch.zeros_like(seen), []
            for learner, memory in zip(self._locals(), known.memories, strict=True):
                read, memory, _ = learner.scan(folded, memory, None, self.backend, frozen=frozen)
                reads = reads + read
                memories.append(memory)
            found.append(reads)
            asked.append(mapped)
            local = parts.leave(ShardState(tuple(memories), key_sum), local)
        if shards.fresh_after is not None:
            local = where_rows(shards.fresh_after, self._fresh_shard(len(position)), local)
        if not found:
            return torch.zeros_like(stretch.queries), stretch.asked, local
        return shards.together(found), shards.together(asked), local


def _at(position: Tensor, local: ShardState) -> ShardState:
    return replace(local, memories=tuple(replace(memory, position=position) for memory in local.memories))


def refuses(local_chunk_sizes: Sequence[int], shard_length: int) -> str | None:
    """Why there are no local memories of these sizes, or None."""
    if not local_chunk_sizes or any(type(size) is not int or size < 1 for size in local_chunk_sizes):
        return f"local_chunk_sizes={local_chunk_sizes!r}: give whole numbers of at least 1"
    lacks = type(shard_length) is not int or shard_length < 1
    if lacks or any(shard_length % size for size in local_chunk_sizes):
        return f"shard_length={shard_length!r}: give a multiple of all of {[*local_chunk_sizes]}"
    return None
