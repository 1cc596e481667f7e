"""Causal attention to the last `window` tokens and to persistent tokens, at a cost linear in time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from titans.nn.attention.attend import attend
from titans.nn.kernels import token
from titans.nn.packing import ALL_REAL, Packed, newest, zero_padding_
from titans.nn.rotary import apply_rotary, rotary_tables


@dataclass(frozen=True)
class WindowState:
    """The past a window still reaches.

    keys, values: (batch, window − 1, heads, head_dim), right-aligned: the last slot is the newest real token;
    keys are rotated by absolute position. position: (batch,) int64, real tokens seen; a row that has seen
    fewer than window − 1 has zeros in its first slots, which are never looked at.
    """

    keys: Tensor
    values: Tensor
    position: Tensor


pytree.register_dataclass(WindowState)


class WindowAttention(nn.Module):
    """Each token attends to itself, to the window − 1 real tokens before it and to all persistent tokens.

    Persistent tokens pass through the same key and value projections, are not rotated and are scored with the
    query before rotation, so no score depends on an absolute position. Scores live in blocks of `window`
    queries against their own and the previous block: memory is proportional to time · window.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, window: int, rope_theta: float = 10000.0
    ) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window={window} must be at least 1: a token always sees itself")
        self.num_heads, self.head_dim, self.window, self.rope_theta = num_heads, head_dim, window, rope_theta
        # Two matrices, because persistent tokens need keys and values only.
        self.query = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * num_heads * head_dim, bias=False)
        self.output = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def initial_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> WindowState:
        """The state of `batch` rows that have seen nothing."""
        empty = torch.zeros(batch, self.window - 1, self.num_heads, self.head_dim, device=device, dtype=dtype)
        return WindowState(empty, empty.clone(), torch.zeros(batch, dtype=torch.int64, device=device))

    def forward(
        self,
        x: Tensor,
        state: WindowState | None = None,
        persistent: Tensor | None = None,
        packed: Packed = ALL_REAL,
    ) -> tuple[Tensor, WindowState]:
        """Attend over a stretch; returns y like x (zeros at padding) and the new state.

        x: (batch, time, hidden_size), packed rows. state: None for the start of every row. persistent:
        (num_persistent, hidden_size), already normalised, or None.
        """
        if packed.lengths is None and (found := self._next_token(x, state, persistent)):
            return found
        batch, time = x.shape[:2]
        x = packed.zero_padding(x)
        plain = (self.query(x) * self.head_dim**-0.5).unflatten(-1, (self.num_heads, self.head_dim))
        keys, values = self._keys_values(x)
        positions = torch.arange(time, device=x.device)
        if state is not None:
            positions = state.position[:, None] + positions
        cos, sin = rotary_tables(positions, self.head_dim, self.rope_theta, plain.dtype)
        rotated, keys = apply_rotary(plain, cos, sin), apply_rotary(keys, cos, sin)

        y = self._attend_blocks(rotated, plain, keys, values, state, persistent)
        y = zero_padding_(self.output(y.flatten(-2)), packed.real)
        return y, self._next_state(keys, values, state, packed.lengths)

    def _next_token(
        self, x: Tensor, state: WindowState | None, persistent: Tensor | None
    ) -> tuple[Tensor, WindowState] | None:
        """`forward` of one token of every row as one operator, or None where there is none for it."""
        if state is None or self.head_dim % 2 or not token.allows(x):
            return None
        weights = token.weights_of(x, self.query, self.key_value, self.output)
        if weights is None or not token.alike(x, state.keys, state.values, persistent):
            return None
        y, *after = torch.ops.titans_native.window_token(
            x.contiguous(), *weights, state.keys, state.values, state.position.contiguous(), persistent,
            self.rope_theta,
        )  # fmt: skip
        return y, WindowState(*after)

    def _keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.key_value(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        return keys, values

    def _next_state(
        self, keys: Tensor, values: Tensor, state: WindowState | None, lengths: Tensor | None
    ) -> WindowState:
        batch, time = keys.shape[:2]
        seen = torch.zeros(batch, dtype=torch.int64, device=keys.device) if state is None else state.position
        return WindowState(
            newest(None if state is None else state.keys, keys, lengths, self.window - 1),
            newest(None if state is None else state.values, values, lengths, self.window - 1),
            seen + (time if lengths is None else lengths),
        )

    def _attend_blocks(
        self,
        rotated: Tensor,
        plain: Tensor,
        keys: Tensor,
        values: Tensor,
        state: WindowState | None,
        persistent: Tensor | None,
    ) -> Tensor:
        """Queries in blocks of `window`, each against the keys of its own block and of the one before."""
        batch, time, heads, dim = rotated.shape
        block = min(self.window, time)
        if block == 0:
            return rotated
        num_blocks = -(-time // block)
        after = num_blocks * block - time
        # Key slots before the first query: a whole block where blocks follow each other, else what there is.
        before = self.window if num_blocks > 1 else 0 if state is None else self.window - 1

        def in_blocks(new: Tensor, old: Tensor | None) -> Tensor:
            if old is not None:
                new = torch.cat([old.to(new.dtype), new], dim=1)
            new = F.pad(new, (0, 0, 0, 0, before + time - new.shape[1], after))
            if num_blocks == 1:
                return new
            new = new.unflatten(1, (num_blocks + 1, block))
            return torch.cat([new[:, :-1], new[:, 1:]], dim=2).flatten(0, 1)

        keys = in_blocks(keys, None if state is None else state.keys)
        values = in_blocks(values, None if state is None else state.values)
        rotated, plain = (
            F.pad(q, (0, 0, 0, 0, 0, after)).view(-1, block, heads, dim) for q in (rotated, plain)
        )

        query = torch.arange(block, device=keys.device)[:, None]
        distance = query + before - torch.arange(before + block, device=keys.device)
        visible = (distance >= 0) & (distance < self.window)
        # Slots before the first token of the row: only the first block reaches back that far.
        missing = before if state is None else (before - state.position)[:, None, None]
        first = visible & (torch.arange(before + block, device=keys.device) >= missing)
        if num_blocks > 1:
            first = first.expand(batch, 1, block, -1) if first.dim() == 2 else first[:, None]
            visible = torch.cat([first, visible.expand(batch, num_blocks - 1, -1, -1)], dim=1).flatten(0, 1)
        else:
            visible = first
        fixed = None if persistent is None else self._keys_values(persistent)
        y = attend(rotated, plain, keys, values, visible, fixed)
        return y.reshape(batch, num_blocks * block, heads, dim)[:, :time]
