"""A memory whose queries are also answered by checkpoints of its weights, taken along the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.memory.precision import autocast_device
from titans.nn.context import BlockContext, MemoryTrace
from titans.nn.memory.caching.checkpoints import Caching, Checkpoints
from titans.nn.memory.layer import NeuralMemory, NeuralMemoryState
from titans.nn.memory.learner import Stretch
from titans.nn.packing import zero_padding
from titans.nn.pieces import cut_pieces
from titans.state import map_state, register_state, where_rows

# What a stretch has of every token.
_TOKENS = ("x", "queries", "keys", "values", "asked", "written")


@register_state
@dataclass(frozen=True)
class CachedMemoryState(NeuralMemoryState):
    """What a `CachedMemory` carries; it grows with the text, see `Caching`."""

    checkpoints: Checkpoints


class CachedMemory(NeuralMemory):
    """A `NeuralMemory` with Memory Caching (arXiv 2602.24281), in the paper's form "gated residual memory".

    A text is cut into segments of `caching.every` tokens. At the end of each, a checkpoint keeps the memory's
    weights; the memory itself goes on from them. A query is answered by the memory M_t as it stands and by
    the kept checkpoints M_i:

        y_t = γ_t,0 M_t(q_t) + Σ_i γ_t,i M_i(q_t),   γ_t = softmax over 0 and i of ⟨u_t, m⟩,   u_t = W_u x_t

    with m_i the mean key of checkpoint i's segment and m_0 that of the running segment so far, token t
    included. Without a checkpoint this is a `NeuralMemory`. Each head has gates of its own.

    Args:
        caching: a `Caching`, or a dict of its fields.
        others: see `NeuralMemory`.

    Raises:
        ValueError: for segments that are not whole chunks, and as `Caching` and `NeuralMemory` do.
    """

    state_type = CachedMemoryState

    def __init__(self, *sizes: Any, caching: Caching | Mapping[str, Any], **others: Any) -> None:
        super().__init__(*sizes, **others)
        self.caching = Caching.of(caching)
        if reason := self.caching.refuses(self.chunk_size):
            raise ValueError(reason)
        self.connector = nn.Linear(self.input.in_features, self.num_heads * self.network.head_dim, bias=False)

    def _begin(self, tail: Tensor, memory: Any) -> CachedMemoryState:
        rows, dtype, device = len(tail), memory.weights[0].dtype, tail.device
        key_sum = torch.zeros(rows, self.num_heads, self.network.head_dim, dtype=dtype, device=device)
        taken = torch.zeros(rows, dtype=torch.int64, device=device)
        none = Checkpoints(
            tuple(w.new_zeros(rows, 0, *w.shape[1:]) for w in memory.weights),
            key_sum.new_zeros(rows, 0, *key_sum.shape[1:]),
            taken.new_zeros(rows, 0),
            taken,
            key_sum,
        )
        return CachedMemoryState(tail, memory, none)

    def fresh_context(self, state: NeuralMemoryState) -> CachedMemoryState:
        """As of a `NeuralMemory`; checkpoints are kept, and a segment still open is closed with one."""
        assert isinstance(state, CachedMemoryState)
        fresh = super().fresh_context(state)
        assert isinstance(fresh, CachedMemoryState)
        tokens = state.memory.position % self.caching.every
        checkpoints = state.checkpoints.taken_at(self.caching, fresh.memory.weights, tokens, tokens > 0)
        return replace(fresh, checkpoints=checkpoints)

    def _learn(
        self,
        stretch: Stretch,
        state: NeuralMemoryState,
        fresh: NeuralMemoryState | None,
        context: BlockContext,
    ) -> tuple[Tensor, Tensor, CachedMemoryState, MemoryTrace | None]:
        """See `NeuralMemory._learn`."""
        assert isinstance(state, CachedMemoryState)
        now, tail, (rows, time) = state, state.tail, stretch.x.shape[:2]
        cut = cut_pieces(now.memory.position, time, context.packed, self.caching.every, stretch.reset)
        if fresh is not None:
            fresh = replace(map_state(lambda x: x.expand(rows, *x.shape[1:]), fresh), tail=tail)
            assert isinstance(fresh, CachedMemoryState)
        reads, traces = [], []
        parts = [cut.apart(getattr(stretch, name)) for name in _TOKENS]
        for piece, *tokens in zip(cut.pieces, *parts, strict=True):
            if piece.fresh is not None and fresh is not None:
                now = where_rows(piece.fresh, fresh, now)
            own = dict(zip(_TOKENS, tokens, strict=True))
            part = stretch._replace(**own, real=piece.packed.real, reset=None)
            before_piece = now.memory.position % self.caching.every
            read, memory, trace = self.scan(
                part, now.memory, None, self.backend, frozen=context.frozen, trace=context.trace
            )
            read, checkpoints = self._with_checkpoints(part, read, now.checkpoints, before_piece)
            whole = torch.full_like(before_piece, self.caching.every)
            checkpoints = checkpoints.taken_at(self.caching, memory.weights, whole, piece.ends)
            now = CachedMemoryState(tail, memory, checkpoints)
            reads.append(read)
            traces += [] if trace is None else [trace]
        if cut.fresh_after is not None and fresh is not None:
            now = where_rows(cut.fresh_after, fresh, now)
        together = cut.together(torch.cat(reads, 1)) if reads else torch.zeros_like(stretch.queries)
        trace = MemoryTrace.joined(traces).map_tokens(cut.together) if traces else None
        return together, stretch.asked, now, trace

    def _with_checkpoints(
        self, part: Stretch, read: Tensor, checkpoints: Checkpoints, count: Tensor
    ) -> tuple[Tensor, Checkpoints]:
        """The gated sum of what the memory and the checkpoints answer, and the sum of keys after the piece.

        read: (batch, time, heads, head_dim), by the memory alone. count: (batch,), tokens of the running
        segment before the piece.
        """
        dtype = checkpoints.key_sum.dtype
        with torch.autocast(autocast_device(read), enabled=False):
            keys = zero_padding(part.keys.to(dtype), part.real)
            sums = checkpoints.key_sum.unsqueeze(1) + keys.cumsum(1)
            after = replace(checkpoints, key_sum=sums[:, -1].clone())
            if not checkpoints.tokens.shape[1]:
                return read, after
            seen = count[:, None] + torch.arange(1, keys.shape[1] + 1, device=keys.device)
            means = sums / seen.to(dtype)[:, :, None, None]
            u = F.linear(part.x.to(dtype), self.connector.weight.to(dtype)).view_as(means)
            running = (u * means).sum(-1).transpose(1, 2)
            kept = torch.einsum("bthd,bshd->bsht", u, checkpoints.means)
            kept = kept.masked_fill((checkpoints.tokens == 0)[:, :, None, None], -torch.inf)
            gates = torch.cat([running.unsqueeze(1), kept], 1).softmax(1).unsqueeze(-1)
            gain, bias = self.norm_in(dtype)
            weights = self.inner.network_weights(checkpoints.weights, self.base)
            asked = part.asked.to(dtype).transpose(1, 2).unsqueeze(1)
            answers = self.network(weights, asked, gain, bias)
            total = gates[:, 0] * read.to(dtype).transpose(1, 2) + (gates[:, 1:] * answers).sum(1)
        return zero_padding(total.transpose(1, 2).to(read.dtype), part.real), after
