"""From corpora to the training and evaluation examples of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from titans.data import (
    CarryDataset,
    StreamDataset,
    WindowDataset,
    encode_document,
    hold_out,
    is_byte_tokenizer,
    load_corpus,
    weighted_corpora,
)
from titans.data.batches import Item
from titans.data.sources import is_streamed
from titans.data.split import AnyDocument
from titans.data.token_cache import OnTokenised, TokenisedDocument, tokenised, tokenised_corpus
from titans.train import insertions
from titans.train.settings import TrainSettings
from titans.train.streaming import streamed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EpochAfterEpoch(Dataset[Item]):
    """`num_examples` examples in training order, one epoch after another.

    An example depends on its number alone, so that a resumed run sees the same examples as an unbroken one.

    Args:
        make_epoch: epoch number → its data set. Every epoch takes as many examples as the first has: a longer
            data set is cut off, and a shorter one starts again.
    """

    def __init__(
        self, make_epoch: Callable[[int], WindowDataset | CarryDataset], num_examples: int, seed: int
    ) -> None:
        self._make_epoch = make_epoch
        self.num_examples = num_examples
        self.seed = seed
        self._begin(0)
        self.epoch_length = len(self.dataset)

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self.dataset = self._make_epoch(epoch)
        self.dataset.set_epoch(epoch)
        size = len(self.dataset)
        # Rows that read documents in order stay in order; windows are independent and are shuffled.
        in_order = isinstance(self.dataset, CarryDataset)
        self._order = (
            np.arange(size) if in_order else np.random.default_rng([self.seed, epoch]).permutation(size)
        )

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> Item:
        epoch, place = divmod(index, self.epoch_length)
        if epoch != self._epoch:
            self._begin(epoch)
        return self.dataset[int(self._order[place % len(self.dataset)])]


class Part(Dataset[Item]):
    """Every `size`-th item of a data set, from the one numbered `rank`. All parts are of the same length:
    items that are missing at the end are there without labels."""

    def __init__(self, dataset: Dataset[Item], rank: int, size: int) -> None:
        self._dataset, self._rank, self._size = dataset, rank, size
        self._count = len(dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return -(-self._count // self._size)

    def __getitem__(self, index: int) -> Item:
        number = index * self._size + self._rank
        if number < self._count:
            return self._dataset[number]
        item = self._dataset[self._count - 1]
        return {**item, "labels": torch.full_like(item["labels"], -100)}


@dataclass(frozen=True)
class HeldOut:
    """Held-out text in windows of one length, each starting with an empty memory.

    `tokens_per_byte`, of all the held-out text, converts bits per token into bits per byte.
    """

    windows: Dataset[Item]
    tokens_per_byte: float


@dataclass(frozen=True)
class Examples:
    """A run's data and its size, which is None where it is streamed."""

    train: EpochAfterEpoch | StreamDataset
    held_out: HeldOut | None
    num_train_documents: int | None
    num_train_tokens: int | None
    held_out_names: tuple[str, ...]


def make_examples(
    settings: TrainSettings,
    tokenizer: PreTrainedTokenizerBase,
    rows: range | None = None,
    on_tokenised: OnTokenised | None = None,
) -> Examples:
    """Load, split and encode the corpora of a run.

    Args:
        rows: which rows of every step this process reads; all by default.
        on_tokenised: called while a cache of tokens is made.

    Raises:
        ValueError: for a corpus that cannot be read, holds nothing, or cannot be split.
        ConnectionError: when a download fails.
        OSError: when a cache of tokens cannot be written.
    """

    def tokens_of(source: str) -> list[TokenisedDocument]:
        if is_byte_tokenizer(tokenizer):
            return [tokenised(document, tokenizer) for document in load_corpus(source)]
        return tokenised_corpus(source, tokenizer, on_tokenised)

    corpora = weighted_corpora(settings.data)
    held_out = None if settings.eval_data is None else tokens_of(settings.eval_data)
    if is_streamed(corpora):
        rows = range(settings.batch_size) if rows is None else rows
        stream, first = streamed(settings, corpora, tokenizer, rows)
        if held_out is None:
            held_out = [tokenised(document, tokenizer) for document in first]
        return Examples(stream, _held_out(settings, held_out), None, None, _names(held_out))
    source = corpora[0].name
    if insertions.are_none(settings.facts):
        texts, others = _split(settings, tokens_of(source))
        whole = _dataset(settings, [text.tokens for text in texts], None)
        count, make_epoch = len(texts), lambda epoch: whole
    else:
        documents, apart = _split(settings, load_corpus(source))
        others = [tokenised(document, tokenizer) for document in apart]
        count = len(documents)

        # Every epoch inserts new facts, so that the model cannot memorise them in its parameters.
        def make_epoch(epoch: int) -> WindowDataset | CarryDataset:
            generator = np.random.default_rng([settings.seed, epoch])
            changed = [insertions.with_insertions(document, settings, generator) for document in documents]
            tokens = [encode_document(tokenizer, text.data, text.name) for text, _ in changed]
            marks = [mark for _, mark in changed if mark is not None]
            return _dataset(settings, tokens, marks or None)

    train = EpochAfterEpoch(make_epoch, settings.steps * settings.batch_size, settings.seed)
    held_out = others if held_out is None else held_out
    size = train.dataset.num_tokens
    return Examples(train, _held_out(settings, held_out), count, size, _names(held_out))


def _split(
    settings: TrainSettings, documents: list[AnyDocument]
) -> tuple[list[AnyDocument], list[AnyDocument]]:
    """(documents to train on, documents to evaluate on)."""
    if settings.eval_data is not None or not settings.hold_out:
        return documents, []
    if len(documents) == 1:
        raise ValueError(
            f"data={settings.data!r} is a single document, and documents are held out whole: give "
            "eval_data, split the text into several files, or set hold_out to 0 for no evaluation"
        )
    return hold_out(documents, settings.hold_out)


def _dataset(
    settings: TrainSettings, tokens: list[np.ndarray], marks: list[np.ndarray] | None
) -> WindowDataset | CarryDataset:
    if settings.carry_memory or settings.in_order:
        return CarryDataset(tokens, settings.sequence_length, settings.batch_size, settings.seed, marks)
    return WindowDataset(tokens, settings.sequence_length, settings.seed, marks)


def _held_out(settings: TrainSettings, documents: list[TokenisedDocument]) -> HeldOut | None:
    if not documents:
        return None
    windows = WindowDataset([text.tokens for text in documents], settings.sequence_length, seed=None)
    count = min(max(settings.eval_tokens // settings.sequence_length, 1), len(windows))
    chosen = np.linspace(0, len(windows) - 1, count).round().astype(int).tolist()
    num_tokens = sum(len(text.tokens) for text in documents)
    return HeldOut(Subset(windows, chosen), num_tokens / sum(text.num_bytes for text in documents))


def _names(documents: list[TokenisedDocument]) -> tuple[str, ...]:
    return tuple(document.name for document in documents)
