"""The features that a graft is trained on: of episodes with facts, and of documents."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from titans.data import Document, encode_document, leading_tokens
from titans.data.facts_blocks import Episode, Episodes, about_json, chat_of
from titans.data.needles import words_of
from titans.hf.graft.base import WindowedBase
from titans.hf.graft.feature_cache import (
    FeatureCache,
    FeatureProgress,
    Unit,
    bytes_per_token,
    write_features,
)
from titans.train.graft.settings import FeatureSettings

_ROWS = 16
# Characters of a document that can matter: no token has more on average.
_LONGEST_TOKENS = 12
_TRIAL_TOKENS = 512


class FeaturePlan:
    """Which features are cached, of which base, and where.

    Args:
        documents: of which training sees parts. held_out: other documents, for evaluation.
        layers: of the base, whose states an association reads; None for documents alone, without facts.

    Raises:
        ValueError: for settings, a tokenizer or documents that cannot be used.
    """

    def __init__(
        self,
        base: WindowedBase,
        tokenizer: Any,
        documents: Sequence[Document],
        held_out: Sequence[Document],
        layers: Sequence[int] | None,
        settings: FeatureSettings | None = None,
        seed: int = 0,
    ) -> None:
        settings = settings or FeatureSettings()
        settings.check()
        self.base, self.layers, self.settings = base, tuple(layers or ()), settings
        found = [*text_units(tokenizer, documents, "text", settings, settings.text_tokens)]
        others = [*text_units(tokenizer, held_out, "text-held-out", settings, 4 * settings.document_tokens)]
        if not found or not others:
            raise ValueError(
                f"{'data' if not found else 'held-out data'} has no text of {2 * settings.block_tokens} "
                "tokens: give longer documents"
            )
        texts = [[unit for _, unit in part] for part in (found, others)]
        if layers is None:
            self.units = _mixed(texts)
            return
        # Facts stand in the documents that training reads, and are of their words.
        documents = [*dict.fromkeys(document for document, _ in found)]
        train, test = (
            episodes_of(tokenizer, fillers, documents, settings) for fillers in (documents, held_out)
        )
        facts = [*fact_units("facts", train, settings.episodes, seed)]
        seen = [*fact_units("facts-held-out", test, settings.held_out_episodes, seed, held_out=True)]
        unseen = fact_units(
            "facts-new-wording", test, settings.held_out_episodes, seed, held_out=True, held_out_wording=True
        )
        self.units = _mixed([facts, *texts, seen, [*unseen]])

    @property
    def tokens(self) -> int:
        return sum(unit.tokens for unit in self.units)

    @property
    def bytes(self) -> int:
        """What all features take on disk."""
        return self.tokens * bytes_per_token(self.base.head.weight.shape[1], self.layers)

    @torch.inference_mode()
    def seconds(self) -> float:
        """About how long caching takes here, from a trial of 512 tokens."""
        ids = torch.zeros(4, _TRIAL_TOKENS // 4, dtype=torch.int64, device=self.base.head.weight.device)
        began = time.perf_counter()
        hidden, _ = self.base.read(ids, self.base.initial_state(len(ids)))
        self.base.head.logits(hidden)
        return (time.perf_counter() - began) / _TRIAL_TOKENS * self.tokens

    def write(
        self, folder: Path, progress: Callable[[FeatureProgress], None] = lambda _: None
    ) -> FeatureCache:
        """Cache what is not there yet; see `write_features` for errors.

        Raises:
            OSError: before anything is written, if the disk has too little room.
        """
        folder.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        free = shutil.disk_usage(folder).free
        if self.bytes - there > free:
            raise OSError(
                f"{folder}: the features take {self.bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: "
                "make room, or cache fewer episodes or less text"
            )
        return write_features(self.base, self.units, folder, self.layers, progress)


def text_units(
    tokenizer: Any, documents: Sequence[Document], group: str, settings: FeatureSettings, most: int
) -> Iterator[tuple[Document, Unit]]:
    """Parts of documents, first the beginnings of all, until there are about `most` tokens."""
    encoded: dict[int, torch.Tensor] = {}
    left, total = [*range(len(documents))], 0
    for begin in itertools.count(0, settings.document_tokens):
        end = begin + settings.document_tokens
        for number in left.copy():
            if total >= most:
                return
            if len(encoded.get(number, ())) < end:
                encoded[number] = _encoded(tokenizer, documents[number], 2 * end)
            part = encoded[number][None, begin:end]
            if part.shape[1] < 2 * settings.block_tokens:
                left.remove(number)
                continue
            total += part.shape[1]
            document = documents[number]
            yield document, Unit(group, {"text": (part, torch.zeros_like(part))}, document.name)
        if not left:
            return


def _encoded(tokenizer: Any, document: Document, most: int) -> torch.Tensor:
    """The first tokens of a document, at most about `most`, as the model is given a text."""
    end = most * _LONGEST_TOKENS
    while 0 < end < len(document.data) and document.data[end] & 0xC0 == 0x80:
        end -= 1  # inside a character
    ids = encode_document(tokenizer, document.data[:end], document.name)[:most]
    return torch.tensor([*leading_tokens(tokenizer), *ids.tolist()])


def episodes_of(
    tokenizer: Any, fillers: Sequence[Document], documents: Sequence[Document], settings: FeatureSettings
) -> Episodes:
    """A source of facts made of the words of `documents`, to be stated and asked for inside `fillers`."""
    words = sorted({word for document in documents for word in words_of(document.data)})
    return Episodes(
        tokenizer,
        [document.data.decode("utf-8", "replace") for document in fillers],
        words,
        length=settings.block_tokens,
        most=settings.facts,
        chat=chat_of(tokenizer),
    )


def fact_units(group: str, source: Episodes, count: int, seed: int, **options: bool) -> Iterator[Unit]:
    """Units of at most 16 episodes each, `count` in all; `options` are those of `Episodes.draw`."""
    generator = np.random.default_rng([seed, *group.encode()])
    for begin in range(0, count, _ROWS):
        rows = [source.draw(generator, **options) for _ in range(min(_ROWS, count - begin))]
        parts = {part: _stacked(rows, part) for part in ("statements", "questions")}
        yield Unit(group, parts, about_json(rows))


def _stacked(rows: Sequence[Episode], part: str) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = [getattr(row, part) for row in rows]
    ids, flags = (np.stack([getattr(block, name) for block in blocks]) for name in ("ids", "flags"))
    return torch.from_numpy(ids), torch.from_numpy(flags)


def _mixed(lists: Sequence[Sequence[Unit]]) -> list[Unit]:
    """All units, those of every list spread evenly, so that features can be used before all are there."""
    placed = [
        (index / len(units), number, unit)
        for number, units in enumerate(lists)
        for index, unit in enumerate(units)
    ]
    return [unit for _, _, unit in sorted(placed, key=lambda entry: entry[:2])]
