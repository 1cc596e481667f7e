"""Causal attention to everything before, for the transformer that the memory is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from titans.nn.packing import ALL_REAL, Packed, place, zero_padding_
from titans.nn.rotary import apply_rotary, rotary_tables


@dataclass(frozen=True)
class FullAttentionState:
    """Everything seen so far.

    keys, values: (batch, slots, heads, head_dim); slot i of row b belongs to its real token i where i <
    position[b] and is zero otherwise; keys are rotated by absolute position. slots = max(position) after a
    call. position: (batch,) int64, real tokens seen.
    """

    growing: ClassVar[tuple[str, ...]] = ("keys", "values")
    keys: Tensor
    values: Tensor
    position: Tensor

    def trimmed(self) -> FullAttentionState:
        """The same without the slots that no row uses."""
        slots = int(self.position.max()) if len(self.position) else 0
        return replace(self, keys=self.keys[:, :slots].clone(), values=self.values[:, :slots].clone())

    def is_whole(self) -> bool:
        """Whether there is a slot for every token."""
        return bool((self.position <= self.keys.shape[1]).all())


pytree.register_dataclass(FullAttentionState)


class FullAttention(nn.Module):
    """Multi-head attention to every earlier real token and the token itself, with rotary positions."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, rope_theta: float = 10000.0) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.rope_theta = num_heads, head_dim, rope_theta
        self.qkv = nn.Linear(hidden_size, 3 * num_heads * head_dim, bias=False)
        self.output = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def initial_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> FullAttentionState:
        """The state of `batch` rows that have seen nothing: no slots."""
        empty = torch.zeros(batch, 0, self.num_heads, self.head_dim, device=device, dtype=dtype)
        return FullAttentionState(empty, empty.clone(), torch.zeros(batch, dtype=torch.int64, device=device))

    def forward(
        self, x: Tensor, state: FullAttentionState | None = None, packed: Packed = ALL_REAL
    ) -> tuple[Tensor, FullAttentionState]:
        """Attend over a stretch; returns y like x (zeros at padding) and the grown state.

        x: (batch, time, hidden_size), packed rows. state: None for the start of every row.
        Continuing a state, or ragged rows, reads the positions on the host.
        """
        batch, time = x.shape[:2]
        x = packed.zero_padding(x)
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        if state is None:
            state = self.initial_state(batch, x.device, keys.dtype)
        fresh = state.keys.shape[1] == 0
        positions = torch.arange(time, device=x.device)
        if not fresh:
            positions = state.position[:, None] + positions
        cos, sin = rotary_tables(positions, self.head_dim, self.rope_theta, queries.dtype)
        queries, keys = apply_rotary(queries, cos, sin), apply_rotary(keys, cos, sin)

        state = self._grow(state, keys, values, packed.lengths)
        if fresh:
            # Padding comes after every real token, so the plain causal mask already hides it.
            y = _attention(queries, keys, values, is_causal=True)
        elif state.keys.shape[1] == 0:
            y = torch.zeros_like(queries)
        else:
            slots = torch.arange(state.keys.shape[1], device=x.device)
            visible = (slots <= positions[..., None])[:, None]
            y = _attention(queries, state.keys, state.values, visible=visible)
        return zero_padding_(self.output(y.flatten(-2)), packed.real), state

    def _grow(
        self, state: FullAttentionState, keys: Tensor, values: Tensor, lengths: Tensor | None
    ) -> FullAttentionState:
        """Row b's new keys go to slots position[b], position[b] + 1, …"""
        time, old = keys.shape[1], state.keys.shape[1]
        position = state.position + (time if lengths is None else lengths)
        if old == 0 and lengths is None:
            return FullAttentionState(keys, values, position)
        held, total = torch.stack([state.position, position]).tolist()
        if lengths is None and all(count == old for count in held):
            return FullAttentionState(
                torch.cat([state.keys.to(keys.dtype), keys], dim=1),
                torch.cat([state.values.to(values.dtype), values], dim=1),
                position,
            )
        size = max(total, default=0)
        return FullAttentionState(
            place(state.keys, keys, state.position, lengths, size),
            place(state.values, values, state.position, lengths, size),
            position,
        )


def _attention(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    y = F.scaled_dot_product_attention(
        queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), visible, is_causal=is_causal
    )
    return y.transpose(1, 2)
