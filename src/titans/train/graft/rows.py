"""Training rows composed from cached features: statements, then text, then questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from titans.hf.graft.feature_cache import FeatureCache, Features

# Shares of the steps that read documents alone, and of the others that begin behind other text.
_TEXT_ONLY, _BEHIND_TEXT = 0.15, 0.5
_MOST_EPISODES = 3


@dataclass(frozen=True)
class Stretch:
    """Features of several rows, each of pieces that the base read apart.

    states, hidden: float32; see `Features`. follows: (rows, time) bool, whether the next token of the row
    followed in the text that the base read, so that its prediction means something.
    """

    states: tuple[Tensor, ...]
    hidden: Tensor
    ids: Tensor
    flags: Tensor
    normaliser: Tensor
    follows: Tensor

    @staticmethod
    def of(rows: Sequence[Sequence[Features]]) -> Stretch:
        """Rows of pieces of one row each, of equal lengths together."""

        def join(pick: list[list[Tensor]]) -> Tensor:
            return torch.cat([torch.cat(pieces, 1) for pieces in pick])

        follows = [[torch.ones_like(piece.flags, dtype=torch.bool) for piece in pieces] for pieces in rows]
        for pieces in follows:
            for piece in pieces:
                piece[:, -1] = False
        count = len(rows[0][0].states)
        return Stretch(
            tuple(
                join([[piece.states[layer].float() for piece in pieces] for pieces in rows])
                for layer in range(count)
            ),
            join([[piece.hidden.float() for piece in pieces] for pieces in rows]),
            join([[piece.ids for piece in pieces] for pieces in rows]),
            join([[piece.flags for piece in pieces] for pieces in rows]),
            join([[piece.normaliser for piece in pieces] for pieces in rows]),
            join(follows),
        )

    def to(self, device: torch.device) -> Stretch:
        tensors = (self.hidden, self.ids, self.flags, self.normaliser, self.follows)
        return Stretch(tuple(x.to(device) for x in self.states), *(x.to(device) for x in tensors))


@dataclass(frozen=True)
class Example:
    """before: what the memory reads first, without learning to; None for nothing. main: what is learned from.

    episodes: how many were used.
    """

    before: Stretch | None
    main: Stretch
    episodes: int


class TrainingRows:
    """Examples from the groups "facts" (parts "statements" and "questions") and "text" of a cache.

    Args:
        tokens: about how many an example has. distance: most tokens between statements and questions, of at
            most half of the longest text.

    Every example depends on the seed, its step and the episodes used so far alone. Every episode is used once
    before any is used again.

    Raises:
        ValueError: for a cache that lacks either group.
    """

    def __init__(self, cache: FeatureCache, tokens: int, distance: int, seed: int) -> None:
        self.cache, self.tokens, self.seed = cache, tokens, seed
        facts, documents = cache.files("facts"), cache.files("text")
        if not facts or not documents:
            missing = "text" if facts else "facts"
            raise ValueError(f"{cache.folder} holds no features of {missing}: finish caching")
        self.episodes = [(path, row) for path in facts for row in range(cache.shape(path)[0])]
        self.block = cache.shape(facts[0])[1]
        self.documents = [(path, cache.shape(path)[1]) for path in documents]
        longest = max(length for _, length in self.documents)
        if longest < 2 * self.block:
            raise ValueError(
                f"{cache.folder}: no text has two blocks of {self.block} tokens; give longer ones"
            )
        self.distance = min(distance, longest // 2)

    def draw(self, step: int, used: int, reach: float) -> Example:
        """The example of a step.

        Args:
            used: episodes of earlier steps. reach: the share of `distance` that is allowed by now.
        """
        generator = np.random.default_rng([self.seed, 1, step])
        most = max(int(reach * self.distance) // self.block, 1)
        blocks = max(self.tokens // self.block, 2)
        behind = int(generator.integers(1, most + 1)) if generator.random() < _BEHIND_TEXT else 0
        if generator.random() < _TEXT_ONLY:
            length = min(blocks, max(most, 2))
            return self._example(
                [self._text(generator, behind, length) for _ in range(blocks // length)], [[]], [[]], 0
            )
        count = int(generator.integers(1, _MOST_EPISODES + 1))
        between = int(generator.integers(0, most + 1))
        rows = max(blocks // (2 * count + between), 1)
        texts = [self._text(generator, behind, between) for _ in range(rows)]
        stated, asked = [], []
        for row in range(rows):
            found = [self._episode(used + row * count + i) for i in range(count)]
            stated.append([parts["statements"] for parts in found])
            asked.append([found[i]["questions"] for i in generator.permutation(count)])
        return self._example(texts, stated, asked, rows * count)

    def _example(
        self,
        texts: list[tuple[Features | None, Features | None]],
        stated: list[list[Features]],
        asked: list[list[Features]],
        episodes: int,
    ) -> Example:
        if len(stated) < len(texts):
            stated, asked = stated * len(texts), asked * len(texts)
        before = [[first] for first, _ in texts if first is not None]
        main = [
            [*of_row, *([text] if text is not None else []), *questions]
            for of_row, (_, text), questions in zip(stated, texts, asked, strict=True)
        ]
        return Example(Stretch.of(before) if before else None, Stretch.of(main), episodes)

    def _episode(self, number: int) -> dict[str, Features]:
        epoch, place = divmod(number, len(self.episodes))
        order = np.random.default_rng([self.seed, 2, epoch]).permutation(len(self.episodes))
        path, row = self.episodes[int(order[place])]
        return self.cache.load(path, slice(row, row + 1))

    def _text(
        self, generator: np.random.Generator, before: int, after: int
    ) -> tuple[Features | None, Features | None]:
        """Consecutive blocks of a document: the first `before` and the next `after`; None for 0."""
        wanted = (before + after) * self.block
        long = [entry for entry in self.documents if entry[1] >= wanted]
        path, length = long[int(generator.integers(len(long)))]
        start = int(generator.integers(0, length - wanted + 1))
        middle = start + before * self.block
        found = self.cache.load(path, tokens=slice(start, start + wanted))["text"] if wanted else None
        return _part(found, 0, middle - start), _part(found, middle - start, wanted)


def _part(found: Features | None, begin: int, end: int) -> Features | None:
    if found is None or begin == end:
        return None
    where = (slice(None), slice(begin, end))
    return Features(
        tuple(state[where] for state in found.states),
        found.hidden[where],
        found.ids[where],
        found.flags[where],
        found.normaliser[where],
    )
