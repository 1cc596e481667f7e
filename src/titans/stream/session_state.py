"""What a session holds between two calls, as a value, and what a feed reports of the change."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from titans.hf.fingerprint import same_weights, weights_sample
from titans.hf.state_file import StateFile, damaged_header
from titans.memory_file import SessionStats, recent_tokens, surprise_so_far
from titans.stream.reader import CausalReader, GraftReader, StateReader, TitansReader
from titans.stream.saved import fingerprint, graft_stats, stats_of, summary_of
from titans.stream.text import NUM_RECENT


@dataclass(frozen=True)
class FeedResult:
    """What `Session.feed` reports.

    tokens: how many were taken in. seconds: how long it took. start: index in the session of the first token
    the model read meanwhile: it is one less than that, because the last token waits for the next call.
    mean_surprise: mean over the tokens read, layers and heads of ‖M(k) − v‖² before each write, of a graft
    with an adaptation its loss in nats; None without a memory or when nothing was read. surprises: (tokens
    read, layers) float32, mean over heads, where asked for.
    """

    tokens: int
    seconds: float
    start: int
    mean_surprise: float | None
    surprises: Tensor | None = None


@dataclass(frozen=True)
class SessionState:
    """Where a session stands; replaced as a whole, so that whatever is interrupted has not happened.

    cache: has read all tokens but the last, and is never written to again. recent: the last tokens.
    surprise, count: its sum over tokens read, layers and heads, and of how many. seconds, read: how long
    this process has read, and how many tokens.
    """

    cache: Any
    recent: tuple[int, ...] = ()
    surprise: float = 0.0
    count: int = 0
    seconds: float = 0.0
    read: int = 0

    @property
    def num_tokens(self) -> int:
        return int(self.cache.num_columns) + bool(self.recent)

    @property
    def mean_surprise(self) -> float | None:
        return self.surprise / self.count if self.count else None

    def unread(self, piece: Tensor) -> Tensor:
        """What the model reads when (n,) ids come in: the token kept back, and all of them but the last."""
        return torch.cat([torch.tensor(self.recent[-1:], dtype=torch.int64), piece])[:-1]

    def after(self, piece: Tensor, cache: Any, surprise: Tensor | None, seconds: float) -> SessionState:
        """After (n,) new ids, of which the cache has read all but the last.

        Raises:
            FloatingPointError: where the surprise is NaN.
        """
        total = 0.0 if surprise is None else float(surprise.sum(dtype=torch.float64))
        if math.isnan(total):
            raise self.no_number()
        return SessionState(
            cache=cache,
            recent=(self.recent + tuple(piece[-NUM_RECENT:].tolist()))[-NUM_RECENT:],
            surprise=self.surprise + total,
            count=self.count + (0 if surprise is None else surprise.numel()),
            seconds=self.seconds + seconds,
            read=self.read + len(piece),
        )

    def after_generated(self, cache: Any, ids: tuple[int, ...]) -> SessionState:
        """After generated ids, all but the last of which the cache has read."""
        return replace(self, cache=cache, recent=(self.recent + ids)[-NUM_RECENT:])

    def since(self, before: SessionState, seconds: float, surprises: list[Tensor] | None) -> FeedResult:
        """The report of a feed that began at `before`; surprises: of its pieces, None where not asked for."""
        count = self.count - before.count
        known = [surprise for surprise in surprises or () if surprise.numel()]
        return FeedResult(
            tokens=self.num_tokens - before.num_tokens,
            seconds=seconds,
            start=before.cache.num_columns,
            mean_surprise=(self.surprise - before.surprise) / count if count else None,
            surprises=torch.cat(known).cpu() if known else None,
        )

    def no_number(self) -> FloatingPointError:
        return FloatingPointError(
            f"the model answers NaN to the text after token {self.num_tokens:,}: load it in another "
            "precision, or check its weights; the session is unchanged"
        )

    def stats(self, reader: StateReader | CausalReader) -> SessionStats:
        """See `Session.stats`."""
        if isinstance(reader, TitansReader):
            found = stats_of(self.cache, self.num_tokens, reader.inner)
        else:
            layers = graft_stats(self.cache) if isinstance(reader, GraftReader) else ()
            found = SessionStats(self.num_tokens, self.cache.nbytes(), layers)
        return replace(
            found,
            mean_surprise=self.mean_surprise,
            tokens_per_second=self.read / self.seconds if self.seconds else None,
        )

    def save(self, reader: StateReader | CausalReader, path: Path, about: Mapping[str, str]) -> None:
        """Write everything to one file, with `about` in its header; errors are those of `Session.save`."""
        if not self.num_tokens:
            raise ValueError("the session is empty: feed() something before saving it")
        cache = self.cache
        if cache.batch_size < 0:
            cache = cache.clone()
            reader.read(torch.zeros(1, 0, dtype=torch.int64), cache)
        own = {
            "fingerprint": fingerprint(reader.model),
            "weights": weights_sample(reader.inner),
            "recent_tokens": json.dumps(self.recent),
            "surprise": json.dumps([self.surprise, self.count]),
        }
        try:
            reader.save(cache, path, {**about, **own, **summary_of(cache, self.num_tokens)})
        except safetensors.SafetensorError as error:
            raise OSError(
                f"{path} could not be written ({error}): give a folder that exists and has room"
            ) from None

    @classmethod
    def load(cls, file: StateFile, reader: StateReader | CausalReader, strict: bool) -> SessionState:
        """What `save` has written; strict: refuse what was made with other weights. ValueError for a file of
        another configuration, checkpoint or number of rows, or a damaged one."""
        cache = reader.load(file)
        if cache.batch_size > 1:
            raise ValueError(f"{file.path} holds {cache.batch_size} rows: a session reads one")
        if strict and not _has_weights_of(reader, file):
            raise ValueError(
                f"{file.path} was made with another checkpoint of the same sizes: load it with that one, or "
                "pass strict=False if the two understand each other"
            )
        recent = recent_tokens(file.path, file.about, reader.vocab_size)
        return cls(cache, recent, *surprise_so_far(file.path, file.about))


def _has_weights_of(reader: StateReader | CausalReader, file: StateFile) -> bool:
    """Whether a model has the weights that a file was made with, in whatever precision."""
    name, sample = file.about.get("fingerprint", ""), file.about.get("weights")
    if name in ("", fingerprint(reader.model)):
        return True
    try:
        return sample is not None and same_weights(reader.inner, name, sample)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise damaged_header(file.path) from None
