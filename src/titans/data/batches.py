"""Encoded documents → training examples of one length.

Both data sets give the same items, ready for the default collator, all of shape (sequence_length + 1,):

    input_ids       int64, 0 where padded
    labels          int64, the input ids again, −100 where padded. They are not shifted: as everywhere in
                    transformers the model shifts, and logits[t] predict labels[t + 1]
    attention_mask  int64, 1 for a token that is read. Padding, always on the right, is not, nor is the last
                    token: it is predicted here, and read as the first of the next segment
    answers         bool, whether labels[t] is one of the answers, where these are given
    facts           bool, whether a token that is read states or answers something, likewise

So `model(**batch).loss` is the mean over all predictions of a batch, and a memory that is carried from one
segment to the next reads every token once.

A document of n tokens holds n - 1 predictions (its first token is never predicted, its last never read), and
every epoch makes each of them exactly once. The last segment of a document is rarely full; how many of the
missing positions are missing at its first segment instead is drawn anew for every epoch, so that the
boundaries move.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Item = dict[str, Tensor]
STATEMENT, ANSWER = 1, 2


def example(tokens: np.ndarray, length: int, marks: np.ndarray | None = None) -> Item:
    """One padded item of a piece of text, of at most length + 1 tokens."""
    size, columns = len(tokens), length + 1
    piece = torch.from_numpy(tokens.astype(np.int64))
    input_ids = torch.zeros(columns, dtype=torch.int64)
    labels = torch.full((columns,), -100, dtype=torch.int64)
    attention_mask = torch.zeros(columns, dtype=torch.int64)
    input_ids[:size], labels[:size], attention_mask[: size - 1] = piece, piece, 1
    item = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    if marks is not None:
        for name, at in (("answers", marks == ANSWER), ("facts", marks[:-1] > 0)):
            item[name] = torch.zeros(columns, dtype=torch.bool)
            item[name][: len(at)] = torch.from_numpy(at)
    return item


class _Segments:
    """The segments of all documents, numbered in reading order; their number does not depend on the epoch."""

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        sequence_length: int,
        marks: Sequence[np.ndarray] | None = None,
    ) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length={sequence_length} must be at least 1")
        for number, document in enumerate(documents):
            if document.ndim != 1 or document.dtype.kind not in "iu":
                raise ValueError(
                    f"documents[{number}] has shape {document.shape} and dtype {document.dtype}; "
                    "give token ids as a one-dimensional array of integers"
                )
        long_enough = [number for number, document in enumerate(documents) if len(document) > 1]
        self.documents = [documents[number] for number in long_enough]
        self.marks = None if marks is None else [marks[number] for number in long_enough]
        if not self.documents:
            raise ValueError(
                "documents holds nothing to predict: give at least one document of two tokens or more"
            )
        self.length = sequence_length
        self.counts = np.array([-(-(len(document) - 1) // sequence_length) for document in self.documents])
        self.starts = np.cumsum(self.counts) - self.counts
        self.total = int(self.counts.sum())
        self.num_tokens = sum(map(len, self.documents))
        self.missing_first = np.zeros(len(self.documents), dtype=np.int64)

    def draw(self, generator: np.random.Generator) -> None:
        """Choose anew how many positions are missing at the first segment of each document."""
        missing = self.counts * self.length - np.array([len(document) - 1 for document in self.documents])
        self.missing_first = generator.integers(0, missing + 1)

    def locate(self, number: int) -> tuple[int, int]:
        """(document, segment within it) of a segment's number."""
        document = int(np.searchsorted(self.starts, number, side="right")) - 1
        return document, number - int(self.starts[document])

    def item(self, document: int, segment: int) -> Item:
        """One padded example."""
        tokens = self.documents[document]
        begin = segment * self.length - int(self.missing_first[document])
        inside = slice(max(begin, 0), begin + self.length + 1)
        return example(
            tokens[inside], self.length, None if self.marks is None else self.marks[document][inside]
        )


class WindowDataset(Dataset[Item]):
    """Independent windows: each starts with an empty memory and lies within one document.

    `seed=None` fixes the windows at the start of each document, for evaluation. Otherwise they are drawn from
    the seed and the epoch: the same two numbers give the same windows everywhere. `marks`: for each
    document (tokens,) uint8, `ANSWER` or `STATEMENT` where one is, else 0.

    Raises ValueError when no document holds two tokens, or a document is not one-dimensional integers.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        sequence_length: int,
        seed: int | None = 0,
        marks: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.seed = seed
        self._segments = _Segments(documents, sequence_length, marks)
        self.set_epoch(0)

    @property
    def num_tokens(self) -> int:
        """Of all documents of two tokens or more."""
        return self._segments.num_tokens

    def set_epoch(self, epoch: int) -> None:
        """Draw the windows of another epoch; Trainer calls this."""
        if self.seed is not None:
            self._segments.draw(np.random.default_rng([self.seed, epoch]))

    def __len__(self) -> int:
        return self._segments.total

    def __getitem__(self, index: int) -> Item:
        return self._segments.item(*self._segments.locate(_checked(index, len(self))))


class CarryDataset(Dataset[Item]):
    """Consecutive segments of documents in consecutive steps, for a memory that is carried from step to step.

    Read it in order, without shuffling, in batches of `batch_rows`: item i belongs to row i % batch_rows of
    step i // batch_rows. Items have one key more:

        restart     () bool: here the row leaves its document for another, so it needs a new state

    All segments of the documents, in an order of documents drawn from the seed and the epoch, are cut into
    `batch_rows` stretches of the same number of steps. So a document may begin in one row's last steps and go
    on in the next row's first, with a new state; the last row is filled up from the beginning of the first.
    `marks`: for each document (tokens,) uint8, `ANSWER` or `STATEMENT` where one is, else 0.

    Raises ValueError when batch_rows is below 1, and as `WindowDataset`.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        sequence_length: int,
        batch_rows: int,
        seed: int = 0,
        marks: Sequence[np.ndarray] | None = None,
    ) -> None:
        if batch_rows < 1:
            raise ValueError(f"batch_rows={batch_rows} must be at least 1")
        self.seed = seed
        self.batch_rows = batch_rows
        self._segments = _Segments(documents, sequence_length, marks)
        self.num_steps = -(-self._segments.total // batch_rows)
        self.set_epoch(0)

    @property
    def num_tokens(self) -> int:
        """Of all documents of two tokens or more."""
        return self._segments.num_tokens

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of documents and their segments for another epoch; Trainer calls this."""
        generator = np.random.default_rng([self.seed, epoch])
        self._segments.draw(generator)
        counts, starts = self._segments.counts, self._segments.starts
        order = generator.permutation(len(counts))
        self._tape = np.concatenate([starts[d] + np.arange(counts[d]) for d in order])

    def __len__(self) -> int:
        return self.num_steps * self.batch_rows

    def __getitem__(self, index: int) -> Item:
        step, row = divmod(_checked(index, len(self)), self.batch_rows)
        place = (row * self.num_steps + step) % self._segments.total
        document, segment = self._segments.locate(int(self._tape[place]))
        item = self._segments.item(document, segment)
        item["restart"] = torch.tensor(step == 0 or segment == 0)
        return item


def _checked(index: int, length: int) -> int:
    if not 0 <= index < length:
        raise IndexError(f"index {index} is outside the {length} items")
    return index
