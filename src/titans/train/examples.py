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
    Document,
    StreamDataset,
    WindowDataset,
    encode_document,
    hold_out,
    load_corpus,
    weighted_corpora,
)
from titans.data.batches import Item
from titans.data.sources import is_streamed
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
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, rows: range | None = None
) -> Examples:
    """Load, split and encode the corpora of a run.

    Args:
        rows: which rows of every step this process reads; all by default.

    Raises:
        ValueError: for a corpus that cannot be read, holds nothing, or cannot be split.
        ConnectionError: when a download fails.
    """
    corpora = weighted_corpora(settings.data)
    evaluation = [] if settings.eval_data is None else load_corpus(settings.eval_data)
    if is_streamed(corpora):
        rows = range(settings.batch_size) if rows is None else rows
        stream, held_out = streamed(settings, corpora, tokenizer, rows)
        return _examples(settings, tokenizer, stream, evaluation or held_out)
    documents = load_corpus(corpora[0].name)
    if settings.eval_data is None and settings.hold_out:
        if len(documents) == 1:
            raise ValueError(
                f"data={settings.data!r} is a single document, and documents are held out whole: give "
                "eval_data, split the text into several files, or set hold_out to 0 for no evaluation"
            )
        documents, evaluation = hold_out(documents, settings.hold_out)
    unchanged = insertions.are_none(settings.facts)

    def make_epoch(epoch: int) -> WindowDataset | CarryDataset:
        generator = np.random.default_rng([settings.seed, epoch])
        changed = [insertions.with_insertions(document, settings, generator) for document in documents]
        tokens = _encode(tokenizer, [document for document, _ in changed])
        found = [mark for _, mark in changed if mark is not None]
        marks = found or None
        if settings.carry_memory or settings.in_order:
            rows = settings.batch_size
            return CarryDataset(tokens, settings.sequence_length, rows, settings.seed, marks)
        return WindowDataset(tokens, settings.sequence_length, settings.seed, marks)

    first = make_epoch(0)
    # Every epoch inserts new facts, so that the model cannot memorise them in its parameters.
    train = EpochAfterEpoch(
        lambda epoch: first if unchanged or epoch == 0 else make_epoch(epoch),
        settings.steps * settings.batch_size,
        settings.seed,
    )
    return _examples(settings, tokenizer, train, evaluation, len(documents), first.num_tokens)


def _examples(
    settings: TrainSettings,
    tokenizer: PreTrainedTokenizerBase,
    train: EpochAfterEpoch | StreamDataset,
    evaluation: list[Document],
    num_documents: int | None = None,
    num_tokens: int | None = None,
) -> Examples:
    return Examples(
        train=train,
        held_out=_held_out(settings, tokenizer, evaluation) if evaluation else None,
        num_train_documents=num_documents,
        num_train_tokens=num_tokens,
        held_out_names=tuple(document.name for document in evaluation),
    )


def _encode(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> list[np.ndarray]:
    return [encode_document(tokenizer, document.data, document.name) for document in documents]


def _held_out(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, documents: list[Document]
) -> HeldOut:
    tokens = _encode(tokenizer, documents)
    windows = WindowDataset(tokens, settings.sequence_length, seed=None)
    count = min(max(settings.eval_tokens // settings.sequence_length, 1), len(windows))
    chosen = np.linspace(0, len(windows) - 1, count).round().astype(int).tolist()
    num_bytes = sum(len(document.data) for document in documents)
    return HeldOut(Subset(windows, chosen), sum(map(len, tokens)) / num_bytes)
