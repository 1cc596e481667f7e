"""Memory as context: attention reads what the memory recalls together with the segment's tokens (section
4.1).

Segment by segment: recall with the memory as it stood when the segment began (21); attend to persistent
tokens, to what was recalled and to the segment (22, 23); write the attention's outputs into the memory and
read it with them, token by token (24, 25); gate. Position i sees recalled and segment tokens up to i alone,
so nothing leaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from titans.memory import MemoryState, memory_read
from titans.nn.attention.segment import SegmentAttention, SegmentState, SegmentTokens
from titans.nn.blocks.mac_segments import read_whole, sizes_of
from titans.nn.blocks.protocol import BlockResult
from titans.nn.blocks.settings import BlockSettings
from titans.nn.context import BlockContext, MemoryTrace
from titans.nn.conv import CausalConv
from titans.nn.memory import starts
from titans.nn.memory.heads import UNIT, head_vectors
from titans.nn.memory.layer import Found, NeuralMemoryState
from titans.nn.memory.token import recall_token
from titans.nn.norm import ReadNorm, RMSNorm
from titans.nn.packing import Packed
from titans.nn.pieces import Piece, cut_pieces
from titans.state import map_state, register_state, where_rows


@register_state
@dataclass(frozen=True)
class MACState:
    """memory: written with attention outputs. snapshot: its weights when the segment began, (batch, heads,
    out, in).

    segment: keys and values of the running segment. recall_tail: last inputs of the recall queries'
        convolution.
    """

    memory: NeuralMemoryState
    snapshot: tuple[Tensor, ...]
    segment: SegmentState
    recall_tail: Tensor


class MACBlock(nn.Module):
    """x + gate(z, memory(z)) with z = attention over persistent tokens, recalled tokens and the segment."""

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        s = settings
        if s.local_chunk_sizes is not None:
            raise ValueError(
                f"local_chunk_sizes={s.local_chunk_sizes!r}: what this block writes depends on what it has "
                "recalled segment by segment, so no shard could be read in parallel; give None"
            )
        self.segment_length = s.segment_length
        self.persistent = s.persistent_tokens()
        self.norm = RMSNorm(s.hidden_size, s.norm_eps)
        width = s.num_heads * s.head_dim
        self.recall_query = nn.Linear(s.hidden_size, width, bias=False)
        self.recall_conv = CausalConv(width, s.conv_kernel)
        self.recall_output = nn.Linear(width, s.hidden_size, bias=False)
        self.attention = SegmentAttention(
            s.hidden_size, s.num_heads, s.head_dim, s.segment_length, s.rope_theta
        )
        self.memory_norm = RMSNorm(s.hidden_size, s.norm_eps)
        self.memory = s.memory()
        self.recall_norm = ReadNorm(s.num_heads, s.head_dim, self.memory.form.decay_to_initial, s.norm_eps)
        self.gate = s.combination()
        if self.memory.start in starts.RECALL:
            self.begin_as_induction()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Persistent tokens, and what has to agree for recall, where the memory begins so too."""
        nn.init.normal_(self.persistent)
        if self.memory.start in starts.RECALL:
            self.begin_as_induction()

    @torch.no_grad()
    def begin_as_induction(self) -> None:
        """The attention begins at the token itself, and recall asks the memory as its own queries do.

        See `titans.nn.memory.starts`. The memory is written with attention outputs, which therefore
        have to differ between tokens, and is asked with tokens, which have to resemble what was written.
        """
        keys, values = self.attention.key_value.weight.chunk(2)
        keys.copy_(self.attention.query.weight)
        # The output for a token that sees itself alone, on the scale that `memory_norm` brings it to.
        alone = self.attention.output.weight @ values
        alone = alone * alone.shape[0] ** 0.5 / torch.linalg.matrix_norm(alone)
        width = self.recall_query.out_features
        self.recall_query.weight.copy_(self.memory.input.weight[:width] @ alone)
        self.recall_conv.weight.copy_(self.memory.conv.weight[:width])

    def initial_state(self, batch: int) -> MACState:
        device, dtype = self.persistent.device, self.persistent.dtype
        memory = self.memory.initial_state(batch, self.persistent)
        return MACState(
            memory,
            memory.memory.weights,
            self.attention.initial_state(batch, device, dtype),
            self.recall_conv.initial_tail(batch, device, dtype),
        )

    def fresh_context(self, state: MACState) -> MACState:
        """An initial state, at a segment's start, that keeps and recalls what the memory has learned."""
        memory = self.memory.fresh_context(state.memory)
        return replace(
            self.initial_state(state.recall_tail.shape[0]), memory=memory, snapshot=memory.memory.weights
        )

    def forward(self, x: Tensor, state: MACState, context: BlockContext) -> BlockResult:
        """x (batch, time, hidden_size), packed rows, to the same shape, and the new state."""
        position, packed = state.memory.memory.position, context.packed
        cut = cut_pieces(position, x.shape[1], packed, self.segment_length)
        if not cut.pieces:
            return BlockResult(x, state)
        if len(cut.pieces) == 1 and packed.lengths is None and cut.pieces[0].packed.lengths is None:
            return self._read_piece(x, state, cut.pieces[0], context)
        normed = packed.zero_padding(self.norm(x))
        own, tail = self._own(normed, state.recall_tail, position, packed)
        fixed = self.attention.fixed(self.persistent)
        assert fixed is not None
        memory, snapshot, segment = state.memory, state.snapshot, state.segment
        attended: list[Tensor] = []
        found: list[Found] = []
        traces: list[MemoryTrace] = []
        leaves, structure = pytree.tree_flatten(own)
        parts = list(zip(*map(cut.apart, leaves), strict=True))
        done = 0
        while done < len(parts):
            piece, count = cut.pieces[done], _num_whole(cut.pieces[done:])
            if count and (sizes := sizes_of(self, x, memory, context)):
                begin = sum(len(part[0][0]) for part in parts[:done])
                mine = map_state(lambda y, b=begin, e=begin + count * self.segment_length: y[:, b:e], own)
                whole = read_whole(self, sizes, mine.queries, mine.prior, mine.tokens, fixed, memory)
                attended.append(whole.attended)
                found.append(whole.found)
                memory, snapshot, segment = whole.memory, whole.snapshot, whole.segment
                done += count
                continue
            mine = pytree.tree_unflatten(parts[done], structure)
            snapshot = _snapshot(piece, memory, snapshot)
            recalled = self._recall(
                mine.queries, mine.prior, snapshot, memory.memory.position, mine.tokens.plain.dtype
            )
            before = None if piece.begins is True else segment
            z, segment = self.attention.attend(mine.tokens, recalled, fixed, before, piece.packed)
            now_read = replace(context, packed=piece.packed)
            read, memory, trace = self.memory.learn(self.memory_norm(z), memory, now_read)
            attended.append(z)
            found.append(read)
            traces += [] if trace is None else [trace]
            done += 1
        # What a piece leaves to the next is known: the rest needs no order.
        answers = self.memory.answer(Found(*(torch.cat(parts, 1) for parts in zip(*found, strict=True))))
        y = cut.together(self.gate(torch.cat(attended, 1), answers))
        trace = MemoryTrace.joined(traces).map_tokens(cut.together) if traces else None
        return BlockResult(x + y, MACState(memory, snapshot, segment, tail), trace)

    def _read_piece(self, x: Tensor, state: MACState, piece: Piece, context: BlockContext) -> BlockResult:
        """`forward` of real tokens inside one segment of every row: equations 21 to 25 in turn."""
        position = state.memory.memory.position
        snapshot = _snapshot(piece, state.memory, state.snapshot)
        normed = self.norm(x)
        recalled, tail = self._recalled(normed, state.recall_tail, snapshot, position)
        start, fresh = position % self.segment_length, piece.begins is True
        z, segment = self.attention(normed, recalled, self.persistent, state.segment, start, fresh=fresh)
        answers, memory, trace = self.memory(self.memory_norm(z), state.memory, context=context)
        return BlockResult(x + self.gate(z, answers), MACState(memory, snapshot, segment, tail), trace)

    def _recalled(
        self, x: Tensor, tail: Tensor, snapshot: tuple[Tensor, ...], position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The context tokens of x, all of which recall from one snapshot, and the convolution's new tail."""
        projections = self.recall_query, self.recall_conv, self.recall_output
        memory = self.memory
        if found := recall_token(memory, projections, self.recall_norm, memory.backend, x, tail, snapshot):
            return found
        asked, prior, tail = self._asked(x, tail, Packed())
        return self._recall(asked, prior, snapshot, position, x.dtype), tail

    def _asked(self, x: Tensor, tail: Tensor, packed: Packed) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the memory is asked for each token, what an empty one answers, and the new tail."""
        memory = self.memory
        (queries,), tail = head_vectors(
            self.recall_conv,
            self.recall_query(x),
            tail,
            memory.network.head_dim,
            (UNIT,),
            packed,
            backend=memory.backend,
        )
        asked = memory.feature_map(queries)
        return asked, memory.prior(asked), tail

    def _own(self, x: Tensor, recall_tail: Tensor, position: Tensor, packed: Packed) -> tuple[_Own, Tensor]:
        """What depends on the tokens alone and not on the memory, and the convolution's new tail."""
        asked, prior, tail = self._asked(x, recall_tail, packed)
        return _Own(asked, prior, self.attention.tokens(x, position)), tail

    def _recall(
        self,
        asked: Tensor,
        prior: Tensor | None,
        snapshot: tuple[Tensor, ...],
        position: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """The context tokens of a piece, (batch, time, hidden_size); asked, prior: see `_asked`."""
        reads = memory_read(
            self.memory.inner,
            asked,
            MemoryState(snapshot, snapshot, position=position),
            norm_weight=self.memory.norm_weight,
            norm_bias=self.memory.norm_bias,
            base=self.memory.base,
        )
        recalled = self.recall_norm(reads, prior).flatten(-2)
        return self.recall_output(recalled.to(dtype))


def _num_whole(pieces: Sequence[Piece]) -> int:
    """How many of the first pieces are whole segments of every row."""
    return sum(1 for _ in takewhile(lambda piece: piece.begins is True and piece.ends is True, pieces))


def _snapshot(piece: Piece, memory: NeuralMemoryState, before: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The weights that a piece recalls from: those with which its segment begins."""
    now = memory.memory.weights
    if piece.begins is None or piece.begins is True:
        return before if piece.begins is None else now
    return where_rows(piece.begins, now, before)


@register_state
@dataclass(frozen=True)
class _Own:
    """Of each token: what the memory is asked, what an empty one answers, and what attention takes."""

    queries: Tensor
    prior: Tensor | None
    tokens: SegmentTokens
