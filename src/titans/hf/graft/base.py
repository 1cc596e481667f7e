"""A base model with a window: its forward pass from any state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from titans.hf.graft.base_cache import BaseCache, SideBySide, call_at
from titans.hf.graft.base_checks import parts_of, tried
from titans.hf.graft.layers import Change, layers_of, states_after
from titans.hf.graft.rotation import Move
from titans.hf.graft.window import Window, WindowState, aligned_right, together

# Blocks that one call reads side by side have at most so many tokens, which was fastest of 256 to 2048.
_TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class _Between:
    """What one call takes from between the layers, and changes there; rows: of `Change`."""

    layers: tuple[int, ...] = ()
    changes: tuple[Change, ...] = ()
    rows: tuple[int, ...] | None = None


class WindowedBase:
    """A causal LM of transformers that sees a `Window` of its text.

    Args:
        model: with rotary positions, and layers that cache keys and values. It is not changed.

    Raises:
        ValueError: for a model that does not support this, with its class and the reason.
    """

    def __init__(self, model: PreTrainedModel, window: Window) -> None:
        self.model, self.window = model, window
        self.name = type(model).__name__
        try:
            parts = parts_of(model)
            self.layers = tried(parts, window)
        except ValueError as error:
            raise ValueError(f"{self.name} cannot be grafted: {error}") from None
        self.config, self.decoder, self.rotary = parts.config, parts.decoder, parts.rotary
        self.sliding, self.head = parts.sliding, parts.head

    @property
    def num_layers(self) -> int:
        return len(self.sliding)

    @property
    def _embeddings(self) -> Tensor:
        weight: Any = self.model.get_input_embeddings().weight
        return cast("Tensor", weight)

    def initial_state(self, rows: int) -> WindowState:
        """Rows that have read nothing."""
        like = self._embeddings

        def empty(shape: tuple[int, int]) -> Tensor:
            return torch.zeros(rows, shape[0], 0, shape[1], dtype=self.model.dtype, device=like.device)

        keys, values = zip(*((empty(k), empty(v)) for k, v in self.layers.shapes), strict=True)
        position = torch.zeros(rows, dtype=torch.int64, device=like.device)
        return WindowState(keys, values, position)

    def read(
        self, x: Tensor, state: WindowState, lengths: Tensor | None = None
    ) -> tuple[Tensor, WindowState]:
        """The hidden states of further tokens, and the state after them.

        Args:
            x: (rows, time) ids or (rows, time, hidden_size) embeddings.
            lengths: (rows,) int64, how many of each row are real, and these come first; None for all.

        Returns last hidden states (rows, time, hidden_size), 0 at padding, and the new state.
        """
        return self._read(x, state, lengths, _Between())

    def read_layers(
        self,
        x: Tensor,
        state: WindowState,
        lengths: Tensor | None = None,
        *,
        layers: Sequence[int],
        changes: Sequence[Change] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...], WindowState]:
        """`read` that also returns the states after chosen layers, (rows, time, hidden_size) each.

        Args:
            layers: indices into the model's layers.
            changes: of the states between layers; see `Change`.

        Returns last hidden states, the states after each of the layers, and the new state.
        """
        both, state = self._read(x, state, lengths, _Between(tuple(layers), tuple(changes)))
        parts = both.chunk(1 + len(layers), -1)
        # As `read` returns them, so that a matrix product of them is the same to the bit.
        hidden, *states = (part.contiguous() for part in parts)
        return hidden, tuple(states), state

    def check_layers(self, layers: Sequence[int], memory: str = "association") -> None:
        """Whether a memory can have the states after these layers.

        Raises:
            ValueError: naming the first layer that there is not, or the reason.
        """
        try:
            if missing := [layer for layer in layers if layer >= self.num_layers]:
                raise ValueError(f"layers has {missing[0]}, and it has layers 0 to {self.num_layers - 1}")
            ids = torch.zeros(1, 2, dtype=torch.int64, device=self._embeddings.device)
            with torch.no_grad():
                self.read_layers(ids, self.initial_state(1), layers=layers)
        except ValueError as error:
            raise ValueError(f"{self.name} can have no such {memory}: {error}") from None

    def _read(
        self, x: Tensor, state: WindowState, lengths: Tensor | None, between: _Between
    ) -> tuple[Tensor, WindowState]:
        """`read`, and after the hidden states those of the chosen layers."""
        rows, time = x.shape[:2]
        if not rows:
            return self.initial_hidden(x, between.layers)[:, None].expand(0, time, -1), state
        positions = state.position.tolist()
        left = [time] * rows if lengths is None else lengths.tolist()
        if len({*positions}) == 1 and len({*left}) == 1:
            hidden, state = self._read_alike(x[:, : left[0]], state, positions[0], between)
            return _padded(hidden, time), state
        if {*left} == {1} and not any(self.sliding):
            return self._read_one_each(x[:, :1], state, positions, between)
        # Rows at different positions proceed together until the first of them ends, or completes a block,
        # where keys move.
        alone = [state.row(row, self.window.slots(positions[row])) for row in range(rows)]
        found: list[list[Tensor]] = [[self.initial_hidden(x, between.layers)] for _ in range(rows)]
        done = [0] * rows
        while going := [row for row in range(rows) if done[row] < left[row]]:
            count = min(min(self.window.room(positions[row]), left[row] - done[row]) for row in going)
            piece = torch.stack([x[row, done[row] : done[row] + count] for row in going])
            hidden, after = self._read_apart(
                piece, [alone[row] for row in going], replace(between, rows=tuple(going))
            )
            for row, mine, state in zip(going, hidden, after, strict=True):
                found[row].append(mine)
                alone[row] = state
                positions[row], done[row] = positions[row] + count, done[row] + count
        hidden = torch.stack([_padded(torch.cat(parts)[None], time)[0] for parts in found])
        return hidden, together(alone)

    def initial_hidden(self, x: Tensor, layers: Sequence[int] = ()) -> Tensor:
        """No hidden states, (0, (1 + number of layers) · hidden_size)."""
        size = self._embeddings.shape[1] * (1 + len(layers))
        return torch.zeros(0, size, dtype=self.model.dtype, device=x.device)

    def _read_alike(
        self, x: Tensor, state: WindowState, position: int, between: _Between
    ) -> tuple[Tensor, WindowState]:
        """`_read` for rows at the same position without padding."""
        found = [self.initial_hidden(x, between.layers).expand(len(x), -1, -1)]
        keys, values = state.keys, state.values
        while x.shape[1]:
            blocks = self._blocks_at_once(x, position, between)
            count = self.window.block * blocks or min(self.window.room(position), x.shape[1])
            hidden, keys, values = self._call(x[:, :count], keys, values, between, blocks=blocks)
            found.append(hidden)
            x, position = x[:, count:], position + count
            if (distance := self.window.distance(position)) is not None:
                keys, values = self._next_block(keys, values, distance)
        moved_on = sum(part.shape[1] for part in found)
        hidden = found[1] if len(found) == 2 else torch.cat(found, 1)
        return hidden, WindowState(keys, values, state.position + moved_on)

    def _blocks_at_once(self, x: Tensor, position: int, between: _Between) -> int:
        """How many whole blocks can be read side by side; 0 where they cannot."""
        if position < self.window.size or position % self.window.block or between.changes:
            return 0
        return min(x.shape[1], max(_TOKENS_AT_ONCE // len(x), self.window.block)) // self.window.block

    def _read_apart(
        self, x: Tensor, states: Sequence[WindowState], between: _Between
    ) -> tuple[Tensor, list[WindowState]]:
        """`_read` for rows at different positions, one state each; x must not cross the end of a block.

        A row with fewer keys than another is aligned right, as the attention mask expects.
        """
        count, slots = x.shape[1], [state.slots for state in states]
        keys, values = (
            tuple(map(aligned_right, zip(*layers, strict=True)))
            for layers in ([state.keys for state in states], [state.values for state in states])
        )
        hidden, keys, values = self._call(x, keys, values, between, torch.tensor(slots, device=x.device))
        after = []
        for row, state in enumerate(states):
            mine = slots[row] + count
            k, v = (tuple(y[[row], :, y.shape[2] - mine :] for y in layers) for layers in (keys, values))
            position = state.position + count
            if (distance := self.window.distance(int(position))) is not None:
                k, v = self._next_block(k, v, distance)
            after.append(WindowState(k, v, position))
        return hidden, after

    def _read_one_each(
        self, x: Tensor, state: WindowState, positions: Sequence[int], between: _Between
    ) -> tuple[Tensor, WindowState]:
        """`_read` of one token (rows, 1) for rows at different positions.

        Keys stay where they are, and each new one is moved behind those of its row: 64 texts that generate
        hold 800 MB of them, and every copy of that counts. A model with a sliding window of its own counts
        keys by their places, so it needs them aligned.
        """
        slots = [self.window.slots(position) for position in positions]
        held, place = max(slots), torch.tensor(slots, device=x.device)
        kept, kept_values = (tuple(y[:, :, :held] for y in layers) for layers in (state.keys, state.values))
        hidden, keys, values = self._call(x, kept, kept_values, between, place, aligned_left=True)
        rows = torch.arange(len(slots), device=x.device)
        for layer in (*keys, *values):
            # The tensors are new: the model has put the new ones behind those that were held.
            layer[rows, :, place] = layer[:, :, held]
        for row, position in enumerate(positions):
            if (distance := self.window.distance(position + 1)) is not None:
                k, v = (tuple(y[[row], :, : slots[row] + 1] for y in layers) for layers in (keys, values))
                moved = self._next_block(k, v, distance)
                for layers, after in zip((keys, values), moved, strict=True):
                    for layer, y in zip(layers, after, strict=True):
                        layer[row, :, : y.shape[2]] = y[0]
        used = max(self.window.slots(position + 1) for position in positions)
        keys, values = (tuple(y[:, :, :used] for y in layers) for layers in (keys, values))
        return hidden, WindowState(keys, values, state.position + 1)

    def _next_block(
        self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], distance: int
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The keys and values that the next block sees: the sinks, then the block that ends here."""
        new, move = [], Move(self.rotary, distance)
        for layer, rotation in zip(keys, self.layers.rotations, strict=True):
            sinks, block = self.window.kept(layer)
            new.append(torch.cat([sinks, move(block, rotation)], 2))
        return tuple(new), tuple(torch.cat(self.window.kept(layer), 2) for layer in values)

    def _call(
        self, x: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], between: _Between,
        slots: Tensor | None = None, blocks: int = 0, aligned_left: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:  # fmt: skip
        """One call of the model: hidden states as of `_read`, and keys and values with the new ones.

        Args:
            slots: (rows,) int64, how many keys each row has; None if all slots are keys. It is also the
                position of the row's first new token.
            blocks: how many whole blocks x holds, which are read side by side; 0: not.
            aligned_left: whether a row's keys are in the first slots, and not in the last.
        """
        rows = len(x)
        if blocks:
            x = x.unflatten(1, (blocks, -1)).flatten(0, 1)
        held = keys[0].shape[2] if keys else 0
        given: dict[str, Any] = {"inputs_embeds" if x.is_floating_point() else "input_ids": x}
        first = torch.full((len(x),), held, device=x.device) if slots is None else slots
        if slots is not None and bool((slots < held).any()):
            column = torch.arange(held + x.shape[1], device=x.device)
            unused = held - slots[:, None]
            seen = (column < slots[:, None]) | (column >= held) if aligned_left else column >= unused
            given["attention_mask"] = seen.long()
        side_by_side = None
        if blocks:
            move = Move(self.rotary, -self.window.block)
            side_by_side = SideBySide(
                blocks, self.window.sinks, lambda k, layer: move(k, self.layers.rotations[layer])
            )
        cache = BaseCache(self.sliding, keys, values, side_by_side)
        if not between.layers and not between.changes:
            hidden, keys, values = call_at(self.decoder, first, given, cache)
        else:
            layers = layers_of(self.decoder, self.num_layers)
            with states_after(layers, between.layers, between.changes, between.rows) as states:
                hidden, keys, values = call_at(self.decoder, first, given, cache)
            if wrong := [tuple(s.shape) for s in states if s.shape != hidden.shape]:
                raise ValueError(
                    f"its layers give states of shape {wrong[0]}, its head takes {tuple(hidden.shape)}"
                )
            hidden = torch.cat([hidden, *(s.to(hidden) for s in states)], -1)
        return hidden.unflatten(0, (rows, -1)).flatten(1, 2), keys, values


def _padded(x: Tensor, time: int) -> Tensor:
    """x (rows, n, size) with zeros behind, (rows, time, size)."""
    missing = time - x.shape[1]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
