"""The text of an answer, token by token: what may be shown already, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from titans.stream.text import NUM_RECENT, text_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answer:
    """What a model answers.

    Args:
        recent: the tokens before the answer, a few of them.
        stops: texts before the first of which the answer ends.
        ends: ids that end it; they are part of the session, and not of the text.
        most: how many tokens it may have, at least 1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        recent: tuple[int, ...],
        *,
        stops: Sequence[str] = (),
        ends: Sequence[int] = (),
        most: int,
    ) -> None:
        self._tokenizer, self._recent = tokenizer, recent
        self._stops, self._ends, self._most = tuple(stops), frozenset(ends), most
        self._shown = 0
        # For each token, how long the text was after it.
        self._lengths: list[int] = []
        self.ids: list[int] = []
        self.text = ""
        self.finish: str | None = None
        self.cut = False

    def add(self, token: int) -> str:
        """Take in a token; returns the text that can be shown now, which may be none.

        What may be the beginning of a stop text waits until it is known. `finish` says "stop" or "length"
        when the answer has ended.
        """
        self.ids.append(token)
        if token in self._ends:
            self.finish = "stop"
        else:
            self.text += text_after(self._tokenizer, self._recent, (token,))
            self._recent = (*self._recent, token)[-NUM_RECENT:]
            found = [at for stop in self._stops if (at := self.text.find(stop, self._shown)) >= 0]
            if found:
                self.text, self.finish, self.cut = self.text[: min(found)], "stop", True
            elif len(self.ids) >= self._most:
                self.finish = "length"
        self._lengths.append(len(self.text))
        end = len(self.text) if self.finish else len(self.text) - self._waiting()
        piece, self._shown = self.text[self._shown : end], end
        return piece

    @property
    def ended_by(self) -> int | None:
        """The id that ended it, if one did."""
        return self.ids[-1] if self.ids and self.ids[-1] in self._ends else None

    def kept(self) -> tuple[list[int], str]:
        """Of an answer that a stop text has cut: the tokens that are whole in it, and the text after them."""
        whole = [n for n, length in enumerate(self._lengths[:-1], 1) if length <= len(self.text)]
        count = whole[-1] if whole else 0
        begin = self._lengths[count - 1] if count else 0
        return self.ids[:count], self.text[begin:]

    def _waiting(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        most = min(max(map(len, self._stops), default=1) - 1, len(self.text) - self._shown)
        ends = (self.text[-count:] for count in range(most, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stops)), 0)
