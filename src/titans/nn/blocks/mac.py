"""Memory as context: what the memory recalls stands beside the segment in the attention's context (section
4.1).

Segment by segment: recall with the memory as it stood when the segment began (21); attend to persistent
tokens, to what was recalled and to the segment (22, 23); write the attention's outputs into the memory and
read it with them, token by token (24, 25); gate. Position i sees recalled and segment tokens up to i alone,
so nothing leaks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from titans.memory import MemoryState, memory_read
from titans.memory.layout import cut_columns
from titans.memory.state import register_state, where_rows
from titans.nn.blocks.settings import BlockContext, BlockSettings
from titans.nn.conv import CausalConv
from titans.nn.gate import MemoryGate
from titans.nn.heads import UNIT, head_vectors
from titans.nn.memory import NeuralMemoryState
from titans.nn.norm import ReadNorm, RMSNorm
from titans.nn.packing import real_tokens, take
from titans.nn.segment_attention import SegmentAttention, SegmentState


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
        self.recall_norm = ReadNorm(s.num_heads, s.head_dim, self.memory.decay_to_initial, s.norm_eps)
        self.gate = MemoryGate(s.hidden_size, s.norm_eps)

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

    def forward(self, x: Tensor, state: MACState, context: BlockContext) -> tuple[Tensor, MACState]:
        """x (batch, time, hidden_size), packed rows, to the same shape, and the new state."""
        normed, time = self.norm(x), x.shape[1]
        if time == 0:
            return x, state
        position = state.memory.memory.position
        phases = set((position % self.segment_length).tolist())
        if context.lengths is None and len(phases) == 1:
            y, state = self._aligned(normed, state, phases.pop(), context)
        else:
            y, state = self._ragged(normed, state, position, context)
        return x + y, state

    def _aligned(
        self, x: Tensor, state: MACState, phase: int, context: BlockContext
    ) -> tuple[Tensor, MACState]:
        outputs, begin = [], 0
        while begin < x.shape[1]:
            end = begin + self.segment_length - phase
            start = torch.full((x.shape[0],), phase, dtype=torch.int64, device=x.device)
            if phase == 0:
                state = self._remember_start(state, None)
            y, state = self._segment(x[:, begin:end], state, start, None, phase == 0, context.surprises)
            outputs.append(y)
            begin, phase = end, 0
        return torch.cat(outputs, 1), self._join(context.surprises, len(outputs), state)

    def _ragged(
        self, x: Tensor, state: MACState, position: Tensor, context: BlockContext
    ) -> tuple[Tensor, MACState]:
        """Rows at different phases, or padded: at most one segment of every row at a time, packed to the
        left."""
        batch, time, hidden = x.shape
        real = real_tokens(context.lengths, time)
        if real is None:
            real = torch.ones(batch, time, dtype=torch.bool, device=x.device)
        columns = cut_columns(position, real, self.segment_length)
        counts = columns.filled.sum(-1)
        collected: list[Tensor] = []
        surprises: list[Tensor] | None = None if context.surprises is None else collected
        outputs = []
        for n in range(columns.filled.shape[1]):
            start, lengths = columns.start[:, n], counts[:, n]
            state = self._remember_start(state, (start == 0) & (lengths > 0))
            y, state = self._segment(take(x, columns.source[:, n]), state, start, lengths, False, surprises)
            outputs.append(y)
        if not outputs:
            return torch.zeros_like(x), state

        def back(parts: list[Tensor]) -> Tensor:
            return torch.where(real.unsqueeze(-1), take(torch.cat(parts, 1), columns.place), 0)

        if context.surprises is not None:
            context.surprises.append(back(collected))
        return back(outputs), state

    @staticmethod
    def _join(surprises: list[Tensor] | None, parts: int, state: MACState) -> MACState:
        if surprises is not None:
            surprises[-parts:] = [torch.cat(surprises[-parts:], 1)]
        return state

    def _remember_start(self, state: MACState, rows: Tensor | None) -> MACState:
        """Take the snapshot in rows (None: all) that begin a segment."""
        now = state.memory.memory.weights
        snapshot = now if rows is None else where_rows(rows, now, state.snapshot)
        return MACState(state.memory, snapshot, state.segment, state.recall_tail)

    def _segment(
        self,
        x: Tensor,
        state: MACState,
        start: Tensor,
        lengths: Tensor | None,
        fresh: bool,
        surprises: list[Tensor] | None,
    ) -> tuple[Tensor, MACState]:
        """Tokens of one segment per row, the first at in-segment index `start` (batch,)."""
        recalled, tail = self._recall(x, state, lengths)
        z, segment = self.attention(x, recalled, self.persistent, state.segment, start, lengths, fresh=fresh)
        answers, memory = self.memory.packed(self.memory_norm(z), state.memory, lengths, surprises=surprises)
        return self.gate(z, answers), MACState(memory, state.snapshot, segment, tail)

    def _recall(self, x: Tensor, state: MACState, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        projected = self.recall_query(x)
        head_dim = self.memory.network.head_dim
        (queries,), tail = head_vectors(
            self.recall_conv, projected, state.recall_tail, head_dim, (UNIT,), lengths
        )
        then = MemoryState(state.snapshot, state.snapshot, state.snapshot, state.memory.memory.position)
        reads = memory_read(
            self.memory.network,
            queries,
            then,
            norm_weight=self.memory.norm_weight,
            norm_bias=self.memory.norm_bias,
            base=self.memory.base,
        )
        recalled = self.recall_norm(reads, self.memory.prior(queries)).flatten(-2)
        return self.recall_output(recalled.to(projected.dtype)), tail
