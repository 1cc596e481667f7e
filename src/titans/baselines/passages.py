"""Retrieval: the passages of a text that share words with a question, by BM25."""

from __future__ import annotations

import re
from collections.abc import Callable


class Passages:
    """The passages of a text, half of each overlapping the next, ranked by bm25s.

    Args:
        text: what was read. num_words: of a passage.

    Raises:
        ImportError: without the package bm25s.
    """

    def __init__(self, text: str, num_words: int = 60) -> None:
        try:
            import bm25s
        except ModuleNotFoundError as error:
            raise ImportError(f"retrieval: {error}; pip install bm25s", name=error.name) from None
        if num_words < 2:
            raise ValueError(f"num_words={num_words}: give at least 2")
        begins = [word.start() for word in re.finditer(r"\S+", text)] or [0]
        ends = [*begins[1:], len(text)]
        step = num_words // 2
        last = max(len(begins) - step, 1)
        self.text = text
        self.spans = [(begins[at], ends[min(at + num_words, len(ends)) - 1]) for at in range(0, last, step)]
        self._tokenize = lambda texts: bm25s.tokenize(texts, stopwords="en", show_progress=False)
        self._index = bm25s.BM25()
        self._index.index(self._tokenize([text[a:b] for a, b in self.spans]), show_progress=False)

    def best(self, question: str, room: int, length: Callable[[str], int]) -> list[str]:
        """The best passages that fit, in the order of the text; overlapping ones are joined.

        Args:
            room: what they may be long, each counted by `length`.
        """
        (ranked,), (scores,) = self._index.retrieve(
            self._tokenize([question]), k=len(self.spans), show_progress=False
        )
        chosen: list[tuple[int, int]] = []
        for number, score in zip(ranked.tolist(), scores.tolist(), strict=True):
            added = _joined([*chosen, self.spans[number]])
            if score <= 0 or sum(length(self.text[a:b]) for a, b in added) > room:
                break
            chosen = added
        return [self.text[a:b].strip() for a, b in chosen]


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, and joined where they meet."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found
