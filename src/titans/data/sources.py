"""Corpora whose documents are read one after the other, in shards, without holding them in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from titans.data.corpora import load_corpus, text_files
from titans.data.documents import Document
from titans.data.hub import PREFIX, HubStream
from titans.stream.reading.sources import read_text


class DocumentSource(Protocol):
    """name: as it was asked for. num_shards: parts that can be read apart from each other."""

    name: str
    num_shards: int

    def documents(self, shard: int, seed: tuple[int, ...]) -> Iterator[Document]:
        """The documents of a shard, always the same for the same seed, which may decide their order."""
        ...


@dataclass(frozen=True)
class Weighted:
    """A corpus, as `titans.data.load_corpus` takes it, and its share of the tokens against others."""

    name: str
    weight: float


def weighted_corpora(data: str | Sequence[str]) -> tuple[Weighted, ...]:
    """Corpora written NAME or NAME=WEIGHT; a file or folder may have such a name itself.

    Raises:
        ValueError: for none, a weight that is not above 0, or weights that only some of them have.
    """
    texts = (data,) if isinstance(data, str) else tuple(data)
    found = [_weighted(text) for text in texts]
    if not found:
        raise ValueError("data=[] names no corpus: give a file, a folder, hf:NAME or a built-in name")
    if len({weight is None for _, weight in found}) > 1:
        raise ValueError(f"data={list(texts)!r}: give all of them a weight, as in books=0.3, or none of them")
    return tuple(Weighted(name, 1.0 if weight is None else weight) for name, weight in found)


def _weighted(text: str) -> tuple[str, float | None]:
    name, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, None
    try:
        weight = float(number)
    except ValueError:
        return text, None
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"data={text!r}: give a weight above 0, or leave the corpus out")
    return name, weight


def is_streamed(corpora: Sequence[Weighted]) -> bool:
    """Whether training reads them as a stream: several corpora, or one that may not fit in memory."""
    return len(corpora) > 1 or corpora[0].name.startswith(PREFIX)


def open_source(name: str) -> DocumentSource:
    """A corpus as a stream.

    Raises:
        ValueError: when there is no such corpus, or no text in it.
        ConnectionError: when it cannot be reached.
    """
    if name.startswith(PREFIX):
        return HubStream(name)
    files = text_files(name)
    return _Files(name, files) if files else _Loaded(name)


class _Files:
    """Files of text; each is read when it is its turn."""

    num_shards = 1

    def __init__(self, name: str, files: dict[str, Path]) -> None:
        self.name, self._files = name, list(files.items())

    def documents(self, shard: int, seed: tuple[int, ...]) -> Iterator[Document]:
        for index in np.random.default_rng(seed).permutation(len(self._files)):
            name, file = self._files[index]
            yield Document(name, read_text(file))


class _Loaded:
    """A corpus that is small enough to be held in memory."""

    num_shards = 1

    def __init__(self, name: str) -> None:
        self.name = name
        self._documents = load_corpus(name)

    def documents(self, shard: int, seed: tuple[int, ...]) -> Iterator[Document]:
        for index in np.random.default_rng(seed).permutation(len(self._documents)):
            yield self._documents[index]
