"""A continuous cache: predictions are mixed with the tokens that followed similar hidden states before.

Grave, Joulin and Usunier, "Improving neural language models with a continuous cache", 2017. With a limit on
the number of entries it is their cache; without one, their later unbounded cache with all entries as
neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from titans.baselines.windowed import WindowedCache, WindowedReader

# Queries compared with all entries at a time.
_QUERIES = 128


@dataclass(frozen=True)
class Entries:
    """The entries of one text, oldest first.

    keys: (entries, hidden_size) float16, hidden states of unit norm. labels: (entries,) int32, the token that
    followed each. awaits: (hidden_size,) float16, the key of the newest token, whose successor is not known
    yet; None before the first.
    """

    keys: Tensor
    labels: Tensor
    awaits: Tensor | None = None

    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.keys, self.labels, self.awaits) if x is not None)


def entry_nbytes(hidden_size: int) -> int:
    """Bytes of one entry: a key in float16 and a label."""
    return 2 * hidden_size + 4


@dataclass(frozen=True)
class ContinuousCache:
    """How a cache is read and written.

    With the unit hidden state q_t of the newest token and the entries (k_i, y_i) before it, the next token is
    w with probability

        (1 − weight) p_model(w) + weight · Σ_i [y_i = w] exp(sharpness q_t·k_i) / Σ_i exp(sharpness q_t·k_i).

    Without entries the model's own prediction is left. The defaults were chosen on Moby Dick alone
    (docs/results/graft-comparison.md).

    weight: in [0, 1]. sharpness: positive. limit: how many of the newest entries are kept; None for all.
    """

    weight: float = 0.05
    sharpness: float = 20.0
    limit: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight}: give a number from 0 to 1")
        if not self.sharpness > 0:
            raise ValueError(f"sharpness={self.sharpness}: give a positive number")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit}: give at least 1, or None for no limit")

    def empty(self, hidden_size: int, device: Any = None) -> Entries:
        return Entries(
            torch.zeros(0, hidden_size, dtype=torch.float16, device=device),
            torch.zeros(0, dtype=torch.int32, device=device),
        )

    def read(self, hidden: Tensor, ids: Tensor, logits: Tensor, entries: Entries) -> tuple[Tensor, Entries]:
        """Mix the cache into predictions, and add what was read to it.

        Args:
            hidden: (time, hidden_size), the head's input at further tokens. ids: (time,), these tokens.
            logits: (kept, vocab_size), the model's at the last so many of them.

        Returns log-probabilities, shaped as logits, and the entries after these tokens.
        """
        keys = F.normalize(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), dim=-1)
        # The state of each token is stored when the next token is read, which is its label.
        waiting = keys.half() if entries.awaits is None else torch.cat([entries.awaits[None], keys.half()])
        labels = ids.to(torch.int32)[len(ids) - len(waiting) + 1 :]
        known = torch.cat([entries.keys, waiting[:-1]])
        followed = torch.cat([entries.labels, labels])
        log_probs = F.log_softmax(logits.to(keys.dtype), -1)
        if self.weight:
            parts = []
            first = len(ids) - len(logits)
            for begin in range(0, len(logits), _QUERIES):
                part = slice(begin, begin + _QUERIES)
                # The newest token's own successor is unknown: a query at place j sees the labels up to j.
                newest = len(known) - len(ids) + 1 + first + torch.arange(len(logits))[part]
                parts.append(self._mixed(log_probs[part], keys[first:][part], newest, known, followed))
            log_probs = torch.cat(parts)
        keep = slice(max(len(known) - self.limit, 0) if self.limit else 0, None)
        return log_probs, Entries(known[keep], followed[keep], waiting[-1])

    def _mixed(
        self, log_probs: Tensor, queries: Tensor, ends: Tensor, keys: Tensor, labels: Tensor
    ) -> Tensor:
        """Log-probabilities (n, vocab) mixed with the entries before ends (n,), at most `limit` of each."""
        last = int(ends[-1])
        begin = max(int(ends[0]) - self.limit, 0) if self.limit else 0
        if last <= begin:
            return log_probs
        place = torch.arange(begin, last)
        seen = place < ends[:, None]
        if self.limit:
            seen &= place >= ends[:, None] - self.limit
        scores = self.sharpness * (queries @ keys[begin:last].to(queries.dtype).T)
        weights = torch.softmax(scores.masked_fill(~seen.to(scores.device), -torch.inf), -1)
        spread = labels[begin:last].long().expand(len(queries), -1)
        found = torch.zeros_like(log_probs).scatter_add_(1, spread, weights)
        mixed = ((1 - self.weight) * log_probs.exp() + self.weight * found).log()
        # A query without entries has weights 0/0.
        return torch.where(seen.any(1)[:, None].to(mixed.device), mixed, log_probs)


class _Cache(WindowedCache):
    """With the entries of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: tuple[Entries, ...] = ()

    def memory_nbytes(self) -> int:
        return sum(entries.nbytes() for entries in self.entries)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.entries = tuple(self.entries[i] for i in indices.tolist())


class ContinuousCacheReader(WindowedReader):
    """A pretrained model with a window and a continuous cache.

    Args:
        model, window, sinks: of `WindowedReader`. cache: how the cache is used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: ContinuousCache | None = None,
        *,
        window: int = 512,
        sinks: int = 4,
    ) -> None:
        super().__init__(model, window=window, sinks=sinks)
        self.continuous = ContinuousCache() if cache is None else cache

    def start(self) -> Any:
        """An empty cache."""
        return _Cache()

    def _read(self, ids: Tensor, cache: Any, all_logits: bool) -> Tensor:
        hidden, cache.window = self.windowed.read(ids, cache.window)
        entries = cache.entries or (self.continuous.empty(hidden.shape[-1], hidden.device),) * len(ids)
        logits = self.windowed.head.logits(hidden if all_logits else hidden[:, -1:])
        read = [
            self.continuous.read(*row, before)
            for row, before in zip(zip(hidden, ids, logits, strict=True), entries, strict=True)
        ]
        mixed, cache.entries = zip(*read, strict=True)
        return torch.stack(mixed).to(logits.dtype)
