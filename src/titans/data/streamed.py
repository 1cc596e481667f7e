"""Streamed corpora → training examples. Each row of a batch reads documents of its own.

Documents are dealt out to the rows of a batch, not to processes, so that the rows read the same tokens
however many processes share them. A corpus of at least as many shards as there are rows is dealt out by
shard, and a process opens only the shards of its rows. Otherwise rows share shards and take their documents
in turn.

The state of a row, its cursor, is a few integers: where it is in which document. Every example carries the
cursor that its row has after it, and a checkpoint holds the cursors of the last batch. A stream that begins
from there makes exactly the examples that the first one would have made. At most one shard of each corpus is
read again up to that place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from titans.data.batches import Item, example
from titans.data.documents import Document
from titans.data.sources import DocumentSource

Encoded = tuple[np.ndarray, np.ndarray | None]
"""Token ids (tokens,), and `marks` as `titans.data.batches` has them or None."""
Encode = Callable[[Document, np.random.Generator], Encoded]
# So many documents in turn in which nothing can be predicted are no chance of their order.
_MOST_SHORT = 64


@dataclass(frozen=True)
class Place:
    """A document of those that are dealt out together, whose shards are read again and again.

    visit: how many shards were read before this one. first: number of its shard's first document. number: its
    own number; documents that are held out or empty have none.
    """

    visit: int
    first: int
    number: int


class _Deal:
    """The documents of some shards, numbered without end, of which row i of `num_rows` takes every
    `num_rows`-th, from the i-th on.

    Args:
        next_places: by row, for the rows of this process alone, the document to take next.
    """

    def __init__(
        self,
        source: DocumentSource,
        shards: Sequence[int],
        num_rows: int,
        next_places: dict[int, Place],
        keep: Callable[[Document], bool],
        seed: int,
    ) -> None:
        self._source, self._shards, self._num_rows = source, shards, num_rows
        self._keep, self._seed = keep, seed
        self._next = {row: place.number for row, place in next_places.items()}
        self._waiting: dict[int, deque[tuple[Document, Place]]] = {row: deque() for row in next_places}
        self._stream = self._numbered(min(next_places.values(), key=lambda place: place.number))

    def take(self, row: int) -> tuple[Document, Place]:
        """The row's next document. What other rows of this process need is kept until they ask for it."""
        while not self._waiting[row]:
            document, place = next(self._stream)
            taker = place.number % self._num_rows
            if taker in self._next and place.number >= self._next[taker]:
                self._next[taker] += self._num_rows
                self._waiting[taker].append((document, place))
        return self._waiting[row].popleft()

    def epoch(self, place: Place) -> int:
        """How often all shards had been read before that of a place."""
        return place.visit // len(self._shards)

    def _numbered(self, begin: Place) -> Iterator[tuple[Document, Place]]:
        visit, first, empty = begin.visit, begin.first, 0
        while empty < len(self._shards):
            number = first
            for document in self._visit(visit):
                yield document, Place(visit, first, number)
                number += 1
            empty = empty + 1 if number == first else 0
            visit, first = visit + 1, number
        raise ValueError(
            f"corpus={self._source.name!r} holds no text to train on: give another, or hold out less of it"
        )

    def _visit(self, visit: int) -> Iterator[Document]:
        epoch, turn = divmod(visit, len(self._shards))
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._shards))
        shard = self._shards[order[turn]]
        return filter(self._keep, self._source.documents(shard, (self._seed, epoch, shard)))


def num_deals(num_rows: int, num_shards: int) -> int:
    """Into how many equal parts the rows of a batch are divided, each with shards of its own."""
    return next(parts for parts in range(min(num_rows, num_shards), 0, -1) if num_rows % parts == 0)


class _Row:
    """What one row of the batch reads, step after step.

    cursor: int64, the source that is being read or −1, how many tokens of its document lie behind, and for
    each source the tokens of documents begun so far and the place of the document that is being read or
    comes next: visit, first, number.
    """

    def __init__(self, stream: StreamDataset, row: int, cursor: np.ndarray, deals: Sequence[_Deal]) -> None:
        self._stream, self._deals, self._row = stream, deals, row
        self._source, self._offset = int(cursor[0]), int(cursor[1])
        numbers = cursor[2:].reshape(len(deals), 4)
        self._begun = numbers[:, 0].astype(np.float64)
        self._places = [Place(*map(int, place)) for place in numbers[:, 1:]]
        # The first choices of the rows differ: exponential times, whose shortest falls to each source as
        # often as its weight says.
        generator = np.random.default_rng([stream.seed, row])
        self._ahead = generator.exponential(stream.sequence_length, len(deals))
        self._text: Encoded | None = None
        # For each source, of the documents without a prediction since the last with one: the epoch of the
        # first, and how many.
        self._short: dict[int, tuple[int, int]] = {}

    @property
    def cursor(self) -> np.ndarray:
        places = [(place.visit, place.first, place.number) for place in self._places]
        numbers = [(int(begun), *place) for begun, place in zip(self._begun, places, strict=True)]
        return np.array([self._source, self._offset, *np.ravel(numbers)], dtype=np.int64)

    def next(self) -> Item:
        """The example of the next step."""
        item = self._packed() if self._stream.packed else self._segment()
        item["cursor"] = torch.from_numpy(self.cursor)
        return item

    def _packed(self) -> Item:
        """Documents one after the other; the last token is read again as the first of the next example."""
        length, pieces, missing = self._stream.sequence_length, [], self._stream.sequence_length + 1
        while missing:
            tokens, marks = self._current()
            end = min(self._offset + missing, len(tokens))
            pieces.append((tokens[self._offset : end], None if marks is None else marks[self._offset : end]))
            missing -= end - self._offset
            self._offset = end
            if missing:
                self._leave()
        self._offset -= 1
        marked = [marks for _, marks in pieces if marks is not None]
        tokens = np.concatenate([tokens for tokens, _ in pieces])
        return example(tokens, length, np.concatenate(marked) if marked else None)

    def _segment(self) -> Item:
        """The next segment of a document, padded where the document ends."""
        length = self._stream.sequence_length
        while len(self._current()[0]) < 2:
            self._skip_short()
        self._short.pop(self._source, None)
        tokens, marks = self._current()
        begin = self._offset
        inside = slice(begin, begin + length + 1)
        item = example(tokens[inside], length, None if marks is None else marks[inside])
        item["restart"] = torch.tensor(begin == 0)
        self._offset += length
        if self._offset >= len(tokens) - 1:
            self._leave()
        return item

    def _skip_short(self) -> None:
        """Leave a document that nothing can be predicted in; ValueError where its corpus holds no others."""
        epoch = self._deals[self._source].epoch(self._places[self._source])
        first, count = self._short.get(self._source, (epoch, 0))
        self._short[self._source] = first, count + 1
        # A whole epoch, and of a small corpus several.
        if epoch > first + 1 and count >= _MOST_SHORT:
            raise ValueError(
                f"corpus={self._stream.sources[self._source].name!r}: none of {count + 1:,} documents in "
                "turn has two tokens, and with carry_memory or in_order each is read alone: join them into "
                "longer documents, or train without these settings"
            )
        self._leave()

    def _current(self) -> Encoded:
        """The document that is being read, the next one where there is none."""
        if self._text is None:
            chosen = self._source < 0
            if chosen:
                self._source = int(np.argmin((self._begun + self._ahead) / self._stream.weights))
            source = self._source
            deal, own = self._stream.deal_of(source, self._row)
            document, place = self._deals[source].take(own)
            self._places[source] = place
            seed = [self._stream.seed, source, deal, place.number]
            self._text = self._stream.encode(document, np.random.default_rng(seed))
            if chosen:
                self._begun[source] += len(self._text[0])
        return self._text

    def _leave(self) -> None:
        place = self._places[self._source]
        later = place.number + self._stream.rows_of_a_deal(self._source)
        self._places[self._source] = replace(place, number=later)
        self._source, self._offset, self._text = -1, 0, None


class StreamDataset(Dataset[Item]):
    """`num_steps` batches of streamed documents; item i is of row i % num_rows of step i // num_rows.

    Read it in order: an item that is not its row's next is found by making all before it. Items are those of
    `titans.data.batches`, and have one key more, `cursor`; where they are not packed they are consecutive
    segments of documents, with `restart` as in `CarryDataset`.

    Args:
        sources: corpora and their weights, shares of the tokens. Each is begun again when it has ended.
        encode: document, generator → tokens and marks. Packed documents should end in a token that says so.
        num_rows: of a batch, of all processes together. rows: those that are asked of this one.
        packed: whether examples are filled with one document after the other.
        keep: which documents to train on; empty ones are left out by this as well.
    """

    def __init__(
        self,
        sources: Sequence[tuple[DocumentSource, float]],
        encode: Encode,
        sequence_length: int,
        num_rows: int,
        num_steps: int,
        *,
        rows: range | None = None,
        packed: bool = True,
        seed: int = 0,
        keep: Callable[[Document], bool] = lambda document: bool(document.data),
    ) -> None:
        self.sources = [source for source, _ in sources]
        self.weights = np.array([weight for _, weight in sources])
        self.encode, self.sequence_length, self.seed, self.packed = encode, sequence_length, seed, packed
        self.num_rows, self.num_steps = num_rows, num_steps
        self.rows = range(num_rows) if rows is None else rows
        self._num_deals = [num_deals(num_rows, source.num_shards) for source in self.sources]
        self._keep = keep
        self._first_step, self._cursors = 0, np.stack([self._at_first(row) for row in range(num_rows)])
        self._steps: dict[int, int] = {}
        self._open: dict[int, _Row] = {}

    def resume(self, step: int, cursors: np.ndarray) -> None:
        """Begin with a later step.

        Args:
            cursors: (num_rows, numbers) int64, those of all rows after the step before.

        Raises:
            ValueError: for cursors of other rows or sources.
        """
        if cursors.shape != self._cursors.shape or cursors.dtype != np.int64:
            raise ValueError(
                f"cursors of shape {cursors.shape} and {cursors.dtype}: {self.num_rows} rows and "
                f"{len(self.sources)} corpora have int64 of shape {self._cursors.shape}"
            )
        self._first_step, self._cursors, self._open = step, cursors, {}

    def rows_of_a_deal(self, source: int) -> int:
        """How many rows share the same shards of a source."""
        return self.num_rows // self._num_deals[source]

    def deal_of(self, source: int, row: int) -> tuple[int, int]:
        """(which of them, the row's number among those that share it)."""
        return divmod(row, self.rows_of_a_deal(source))

    def __len__(self) -> int:
        return self.num_rows * self.num_steps

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} items")
        step, row = divmod(index, self.num_rows)
        if step < self._first_step or row not in self.rows:
            raise IndexError(f"item {index}, row {row} of step {step}, is not read by this process any more")
        if not self._open or step < self._steps[row]:
            self._begin()
        while self._steps[row] < step:
            self._open[row].next()
            self._steps[row] += 1
        self._steps[row] += 1
        return self._open[row].next()

    def _begin(self) -> None:
        places: dict[tuple[int, int], dict[int, Place]] = {}
        for row in self.rows:
            numbers = self._cursors[row][2:].reshape(len(self.sources), 4)
            for source, (_, *place) in enumerate(numbers.tolist()):
                deal, own = self.deal_of(source, row)
                places.setdefault((source, deal), {})[own] = Place(*place)
        deals = {
            (source, deal): _Deal(
                self.sources[source],
                range(deal, self.sources[source].num_shards, self._num_deals[source]),
                self.rows_of_a_deal(source),
                own,
                self._keep,
                self.seed,
            )
            for (source, deal), own in places.items()
        }
        self._steps = dict.fromkeys(self.rows, self._first_step)
        for row in self.rows:
            its = [deals[source, self.deal_of(source, row)[0]] for source in range(len(self.sources))]
            self._open[row] = _Row(self, row, self._cursors[row], its)

    def _at_first(self, row: int) -> np.ndarray:
        firsts = [(0, 0, 0, self.deal_of(source, row)[1]) for source in range(len(self.sources))]
        return np.array([-1, 0, *np.ravel(firsts)], dtype=np.int64)
