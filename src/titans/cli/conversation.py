"""A conversation with any reader, in the model's own template, with texts that are read in between."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria

from titans.stream import Session
from titans.stream.reading.reading import Reading
from titans.stream.reading.sources import find_sources
from titans.stream.turns import BEGUN, Turns, end_tokens


@dataclass
class Conversation:
    """What was said and read, and how to go on. Whatever fails or is interrupted has not happened.

    begun: whether a message was answered.
    """

    session: Session
    turns: Turns
    begun: bool = False

    def fork(self) -> Conversation:
        """An independent conversation with the same past."""
        return Conversation(self.session.fork(), self.turns, self.begun)

    def ask(
        self, message: str, show: Callable[[str], None], stopped: Callable[[], bool], **sampling: Any
    ) -> None:
        """Answer a message.

        Args:
            show: called with each new piece of the answer.
            stopped: asked after every token whether to stop there; what was answered is kept.
            sampling: of transformers' `generate`, with max_new_tokens, at least 1.

        Raises:
            ValueError: for a text that is not valid, or one for which the model has no positions left.
        """
        past = self.session.fork()
        turns, last, ends = self.turns, _LastToken(), self._end_tokens()
        text = turns.later(message) if self.begun else turns.first(message, begins_text=not past.num_tokens)
        try:
            self.session.feed(text)
            sampling["max_new_tokens"] = self._room(sampling["max_new_tokens"])
            if ends:
                sampling["eos_token_id"] = ends
            stream = self.session.generate(stream=True, stopping_criteria=[last], **sampling)
            for piece in stream:
                show(piece)
                if stopped():
                    break
            stream.close()
            # The end token is part of the session already, and so is what was generated and not shown.
            end = str(turns.tokenizer.decode(list(self.session.recent[-1:])))
            self.session.feed(turns.rest_of_closing(end, last.id if last.id in ends else None))
        except BaseException:
            self.session = past
            raise
        self.begun = True

    def read(self, paths: Sequence[Path], progress: Callable[[int], Any]) -> None:
        """Read files and folders. An error or an interruption leaves what was read by then.

        Args:
            progress: called with the bytes to read; gives a context as `ReadingProgress` is.

        Raises:
            ValueError: for what cannot be read as text.
        """
        with tempfile.TemporaryDirectory(prefix="titans-") as scratch:
            sources = find_sources(paths, Path(scratch))
            reading = Reading(self.session, self.turns.tokenizer, sources)
            with progress(sum(source.num_bytes for source in sources)) as shown:
                reading.read(lambda done, name: shown.update(done, reading.tokens, name), lambda: None)

    def save(self, path: Path) -> None:
        """Write a memory file.

        Raises:
            ValueError: before anything was said or read. OSError: if it cannot be written.
        """
        self.session.save(path, {BEGUN: "begun"} if self.begun else {})

    @classmethod
    def load(cls, path: Path, model: Any, turns: Turns) -> Conversation:
        """Go on from a memory file, of `save` or of `titans memorize`.

        Raises:
            ValueError: for a damaged file, or another model's.
        """
        from titans.hf.state_file import open_state_file

        session = Session.load(path, model, turns.tokenizer)
        with open_state_file(path) as file:
            return cls(session, turns, BEGUN in file.about)

    def forget(self) -> None:
        """Start anew."""
        self.session.reset()
        self.begun = False

    def _room(self, most: int) -> int:
        """How many of so many tokens the model has positions for, before the closing; ValueError for none."""
        closing = len(self.turns.tokenizer.encode(self.turns.closing, add_special_tokens=False))
        reader, now = self.session.reader, self.session.num_tokens + closing
        reader.check_room(now + 1)
        return most if reader.most_tokens is None else min(most, reader.most_tokens - now)

    def _end_tokens(self) -> list[int]:
        return list(dict.fromkeys([*end_tokens(self.session.reader.inner), *self.turns.end_tokens]))


class _LastToken(StoppingCriteria):  # type: ignore[misc]
    """Notes the newest token, and never stops."""

    id = -1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.id = int(input_ids[0, -1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
