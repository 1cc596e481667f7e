"""Which part of which text each row of a step reads: rows read texts from their beginnings, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Segment:
    """A part of a text. text: its index. begin: its first token, 0 where a memory begins anew."""

    text: int
    begin: int


class Segments:
    """The segments of every step.

    A row reads a text from its beginning, one segment in each step, then another text; every text is begun
    once before any is begun again. What is left of a text at its end, less than a segment, is not read.

    Args:
        lengths: tokens of each text. rows: read side by side. tokens: of a segment.

    Raises:
        ValueError: if no text has a segment.
    """

    def __init__(self, lengths: Sequence[int], rows: int, tokens: int, seed: int) -> None:
        self.counts = [length // tokens for length in lengths]
        if not any(self.counts):
            raise ValueError(f"no text has {tokens} tokens: give longer texts, or fewer tokens for a step")
        self.tokens, self.seed = tokens, seed
        self._rows: list[list[Segment]] = [[] for _ in range(rows)]
        self._begun = 0

    def at(self, step: int) -> list[Segment]:
        """One segment for each row; it depends on the arguments and the step alone."""
        while min(map(len, self._rows)) <= step:
            row = min(range(len(self._rows)), key=lambda number: len(self._rows[number]))
            text = self._text(self._begun)
            self._begun += 1
            self._rows[row] += (Segment(text, place * self.tokens) for place in range(self.counts[text]))
        return [row[step] for row in self._rows]

    def _text(self, number: int) -> int:
        epoch, place = divmod(number, len(self.counts))
        return int(np.random.default_rng([self.seed, 5, epoch]).permutation(len(self.counts))[place])
