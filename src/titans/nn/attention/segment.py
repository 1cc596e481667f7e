"""Attention inside one segment: persistent tokens, what the memory returned, and the tokens themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from titans.nn.attention.attend import attend
from titans.nn.kernels import token
from titans.nn.packing import ALL_REAL, Packed, place, zero_padding_
from titans.nn.rotary import apply_rotary, rotary_tables


@dataclass(frozen=True)
class SegmentState:
    """The keys and values of the segment so far, (batch, segment_length, heads, head_dim) each.

    The slot is the index in the segment. Slots not yet reached are zero; what stands at or after the next
    call's `start` is never looked at.
    """

    context_keys: Tensor
    context_values: Tensor
    token_keys: Tensor
    token_values: Tensor


@dataclass(frozen=True)
class SegmentTokens:
    """What attention takes of the tokens themselves: their index in the segment, (batch or 1, time), with its
    cosines and sines; (batch, time, heads, head_dim) each, queries with and without rotation, rotated keys,
    values.
    """

    index: Tensor
    cos: Tensor
    sin: Tensor
    plain: Tensor
    rotated: Tensor
    keys: Tensor
    values: Tensor


pytree.register_dataclass(SegmentState)
pytree.register_dataclass(SegmentTokens)


class SegmentAttention(nn.Module):
    """The token at index j of its segment sees the persistent tokens, the context h_≤j and the tokens s_≤j
    (eq. 22, 23).

    Queries come from the tokens; persistent tokens, context and tokens share the key and value projections.
    Queries and keys of h_j and s_j are rotated by j; persistent keys are not, and meet the query before
    rotation.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        segment_length: int,
        rope_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        if segment_length < 1:
            raise ValueError(f"segment_length={segment_length} must be at least 1")
        self.num_heads, self.head_dim = num_heads, head_dim
        self.segment_length, self.rope_theta = segment_length, rope_theta
        # Two matrices, because context and persistent tokens need keys and values only.
        self.query = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * num_heads * head_dim, bias=False)
        self.output = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def initial_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> SegmentState:
        """The state of `batch` rows at the start of a segment."""
        shape = (batch, self.segment_length, self.num_heads, self.head_dim)
        return SegmentState(*(torch.zeros(shape, device=device, dtype=dtype) for _ in range(4)))

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        persistent: Tensor | None = None,
        state: SegmentState | None = None,
        start: Tensor | None = None,
        packed: Packed = ALL_REAL,
        fresh: bool = False,
    ) -> tuple[Tensor, SegmentState]:
        """Attend over a stretch inside one segment per row; returns z like x (zeros at padding) and the new
        state.

        x: (batch, time, hidden_size), packed rows, time ≤ segment_length. persistent: (num_persistent,
        hidden_size), already normalised, or None. The others: see `attend`.
        """
        if x.shape[1] == 0 and state is not None:
            return x, state
        if packed.lengths is None and (
            found := self._next_token(x, context, persistent, state, None if fresh else start)
        ):
            return found
        if state is None or fresh:
            state, start = None, None
        elif start is None:
            raise ValueError("start=None with a state: pass each row's index in its segment, or fresh=True")
        x = packed.zero_padding(x)
        tokens = self.tokens(x, x.new_zeros(1, dtype=torch.int64) if start is None else start)
        return self.attend(tokens, context, self.fixed(persistent), state, packed)

    def _next_token(
        self,
        x: Tensor,
        context: Tensor,
        persistent: Tensor | None,
        state: SegmentState | None,
        start: Tensor | None,
    ) -> tuple[Tensor, SegmentState] | None:
        """`forward` of one token of every row as one operator, or None where there is none for it.

        start: None where the token is the first of its segment in every row.
        """
        if state is None or self.head_dim % 2 or not token.allows(x):
            return None
        weights = token.weights_of(x, self.query, self.key_value, self.output)
        old = [state.context_keys, state.context_values, state.token_keys, state.token_values]
        if weights is None or not token.alike(x, *old, persistent) or context.dtype != x.dtype:
            return None
        index = x.new_zeros(len(x), dtype=torch.int64) if start is None else start.contiguous()
        y, after = torch.ops.titans_native.segment_token(
            x.contiguous(), context.contiguous(), *weights, old, index, persistent, self.rope_theta
        )
        return y, SegmentState(*after)

    def tokens(self, x: Tensor, start: Tensor) -> SegmentTokens:
        """What does not depend on the context, of a stretch that may cross segments.

        x: (batch, time, hidden_size). start: (batch,) or (1,) int64, index in its segment of each row's first
        token.
        """
        index = (start[:, None] + torch.arange(x.shape[1], device=x.device)) % self.segment_length
        plain = (self.query(x) * self.head_dim**-0.5).unflatten(-1, (self.num_heads, self.head_dim))
        cos, sin = rotary_tables(index, self.head_dim, self.rope_theta, plain.dtype)
        keys, values = self._keys_values(x)
        return SegmentTokens(
            index, cos, sin, plain, apply_rotary(plain, cos, sin), apply_rotary(keys, cos, sin), values
        )

    def fixed(self, persistent: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the persistent tokens (num_persistent, hidden_size)."""
        return None if persistent is None else self._keys_values(persistent)

    def attend(
        self,
        tokens: SegmentTokens,
        context: Tensor,
        fixed: tuple[Tensor, Tensor] | None,
        state: SegmentState | None,
        packed: Packed = ALL_REAL,
    ) -> tuple[Tensor, SegmentState]:
        """`forward` given `tokens` and `fixed` of its stretch.

        context: (batch, time, hidden_size), the context token h_j for each token s_j. state: what the
        segment holds before the stretch; None where every row begins its segment with it. No row may go on
        beyond its segment.
        """
        time = context.shape[1]
        if time > self.segment_length:
            raise ValueError(
                f"time={time} exceeds segment_length={self.segment_length}: call once per segment"
            )
        lengths = packed.lengths
        context_keys, context_values = self._keys_values(packed.zero_padding(context))
        new = (
            apply_rotary(context_keys, tokens.cos, tokens.sin),
            context_values,
            tokens.keys,
            tokens.values,
        )
        if state is None:
            seen = new
            after = (0, 0, 0, 0, 0, self.segment_length - time)
            state = SegmentState(*(F.pad(part, after) for part in new))
        else:
            old = (state.context_keys, state.context_values, state.token_keys, state.token_values)
            start = tokens.index[:, 0].expand(len(context))
            seen = tuple(
                place(o, n, start, lengths, self.segment_length) for o, n in zip(old, new, strict=True)
            )
            # A row without new tokens keeps its state, stale slots and all.
            idle = None if lengths is None else (lengths == 0)[:, None, None, None]
            kept = seen if idle is None else (torch.where(idle, o, s) for o, s in zip(old, seen, strict=True))
            state = SegmentState(*kept)
        visible = torch.arange(seen[0].shape[1], device=context.device) <= tokens.index[..., None]
        z = attend(
            tokens.rotated,
            tokens.plain,
            torch.cat([seen[0], seen[2]], dim=1),
            torch.cat([seen[1], seen[3]], dim=1),
            torch.cat([visible, visible], dim=-1),
            fixed,
        )
        return zero_padding_(self.output(z.flatten(-2)), packed.real), state

    def _keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.key_value(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        return keys, values
