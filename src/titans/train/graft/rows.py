"""Training rows composed from cached features: statements, then text, then questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from titans.hf.graft.feature_cache import FeatureCache, Features

# Share of the steps that read documents alone, and of the rows whose memory is empty at first.
_TEXT_ONLY, _EMPTY = 0.1, 0.3
# Episodes of a row, and most tokens of text between their statements and questions.
_EPISODES, _BETWEEN = 2, 256
# So many texts are read before facts are stated, each at least of so many tokens; for so many steps.
_BEFORE, _LEAST_BEFORE, _STEPS_BEFORE = 4, 256, 25


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
    """before: (rows,) int64, which of the texts of `TrainingRows.before` each row's memory has read, 0 for
    none, 1 for the first. main: what is learned from. episodes: how many were used."""

    before: Tensor
    main: Stretch
    episodes: int


class TrainingRows:
    """Examples from the groups "facts" (parts "statements" and "questions") and "text" of a cache.

    Args:
        tokens: about how many an example has. distance: most tokens of text that a memory has read before, of
            at most three quarters of the longest text.

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
        self.distance = min(distance, longest * 3 // 4)

    def first_of(self, step: int) -> bool:
        """Whether memories read the texts of `before` anew at this step."""
        return step % _STEPS_BEFORE == 0

    def before(self, step: int) -> list[Stretch]:
        """Texts that memories read, without learning to, before the facts of this step are stated."""
        return [Stretch.of([[self._text(*place)]]) for place in self._places(step)]

    def _places(self, step: int) -> list[tuple[Path, int, int]]:
        """File, first token and number of tokens of each of the texts of `before`."""
        generator = np.random.default_rng([self.seed, 4, step // _STEPS_BEFORE])
        least = min(_LEAST_BEFORE, self.distance)
        found = []
        for _ in range(_BEFORE):
            count = int(np.exp(generator.uniform(np.log(least), np.log(self.distance))))
            long = [entry for entry in self.documents if entry[1] >= count * 4 // 3]
            path, length = long[int(generator.integers(len(long)))]
            # Some text is left after it.
            found.append((path, int(generator.integers(0, length - count * 4 // 3 + 1)), count))
        return found

    def draw(self, step: int, used: int) -> Example:
        """The example of a step; `used` episodes were those of earlier steps."""
        generator = np.random.default_rng([self.seed, 1, step])
        texts_alone = generator.random() < _TEXT_ONLY
        between = int(np.exp(generator.uniform(0, np.log(_BETWEEN + 1)))) - 1
        if texts_alone:
            between = 2 * self.block
        count = 0 if texts_alone else _EPISODES
        rows = max(round(self.tokens / (2 * count * self.block + between)), 1)
        places = self._places(step)
        before = generator.integers(1, len(places) + 1, size=rows)
        before[generator.random(rows) < _EMPTY] = 0
        main = []
        for row, place in enumerate(before.tolist()):
            found = [self._episode(used + row * count + i) for i in range(count)]
            text = self._after(generator, places[place - 1] if place else None, between) if between else None
            main.append(
                [
                    *(parts["statements"] for parts in found),
                    *([] if text is None else [text]),
                    *(found[i]["questions"] for i in generator.permutation(count)),
                ]
            )
        return Example(torch.from_numpy(before), Stretch.of(main), rows * count)

    def _episode(self, number: int) -> dict[str, Features]:
        epoch, place = divmod(number, len(self.episodes))
        order = np.random.default_rng([self.seed, 2, epoch]).permutation(len(self.episodes))
        path, row = self.episodes[int(order[place])]
        return self.cache.load(path, slice(row, row + 1))

    def _after(
        self, generator: np.random.Generator, place: tuple[Path, int, int] | None, count: int
    ) -> Features:
        """Text that comes after a text of `before` in its document, or of any document."""
        known = dict(self.documents)
        path, least = None, 0
        if place is not None and known[place[0]] - place[1] - place[2] >= count:
            path, least = place[0], place[1] + place[2]
        if path is None:
            long = [path for path, length in self.documents if length >= count]
            path = long[int(generator.integers(len(long)))]
        return self._text(path, int(generator.integers(least, known[path] - count + 1)), count)

    def _text(self, path: Path, start: int, count: int) -> Features:
        return self.cache.load(path, tokens=slice(start, start + count))["text"]
