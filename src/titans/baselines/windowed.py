"""A pretrained model that reads through a window and keeps nothing else: what the other readers build on."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from titans.hf.graft.base import WindowedBase
from titans.hf.graft.window import Window, WindowState
from titans.state import map_state, state_nbytes
from titans.stream.causal import Read
from titans.stream.model import reading


class WindowedCache:
    """What a `WindowedReader` has read. Its parts are values; reading replaces them.

    window: the keys and values that attention can still see; None before the first token. num_columns: tokens
    read.
    """

    def __init__(self) -> None:
        self.window: WindowState | None = None
        self.num_columns = 0

    @property
    def batch_size(self) -> int:
        """Rows held, or −1 before the first token."""
        return -1 if self.window is None else len(self.window.position)

    def memory_nbytes(self) -> int:
        """Bytes of what is kept in addition to the window."""
        return 0

    def nbytes(self) -> int:
        """Bytes of everything that is needed to read on."""
        return state_nbytes(self.window) + self.memory_nbytes()

    def clone(self) -> Self:
        """An independent copy."""
        return copy.copy(self)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may come several times."""
        if self.window is not None:
            self.window = map_state(lambda x: x.index_select(0, indices.to(x.device)), self.window)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if repeats > 1 and self.window is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))


class WindowedReader:
    """A causal LM of transformers that sees a window of its text, as a grafted model's base does.

    It has the interface of `titans.stream.reader.Reader`. Any split of a text into calls gives the same
    result up to rounding.

    Args:
        model: with rotary positions; it is not changed. window, sinks: see `titans.graft`.

    Raises:
        ValueError: for a model that cannot read through a window, with the reason.
    """

    def __init__(self, model: PreTrainedModel, *, window: int = 512, sinks: int = 4) -> None:
        self.model = model
        self.windowed = WindowedBase(model, Window(window, sinks))
        self.vocab_size: int = self.windowed.config.vocab_size

    def start(self) -> Any:
        """An empty cache."""
        return WindowedCache()

    def check_room(self, num_tokens: int) -> None:
        """Any number of tokens."""

    def read(
        self, ids: Tensor, cache: Any, *, all_logits: bool = False, output_surprise: bool = False
    ) -> Read:
        """Read on: ids (rows, n) int64, all of them real tokens; the cache is changed in place."""
        if not ids.shape[1]:
            return Read(None)
        with reading(self.model):
            if cache.window is None:
                cache.window = self.windowed.initial_state(len(ids))
            logits = self._read(ids.to(self.model.device), cache, all_logits)
            cache.num_columns += ids.shape[1]
        return Read(logits)

    def _read(self, ids: Tensor, cache: Any, all_logits: bool) -> Tensor:
        """Logits of all positions or the last; the cache's parts are replaced."""
        hidden, cache.window = self.windowed.read(ids, cache.window)
        return self.windowed.head.logits(hidden if all_logits else hidden[:, -1:])
