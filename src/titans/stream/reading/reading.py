"""Files on their way into a session's memory, so that a reading that was cut off can go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans.hf.state_file import damaged_header, open_state_file
from titans.stream.reading.pieces import Piece, read_pieces
from titans.stream.reading.sources import Source
from titans.stream.reading.survey import Survey
from titans.stream.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEADER = "reading"


@dataclass(frozen=True)
class Place:
    """The piece that begins at a file's byte `offset`, of which `taken` tokens are read; and when it all
    began: at the session's token `began`."""

    file: int = 0
    offset: int = 0
    taken: int = 0
    began: int = 0


class Reading:
    """Reads sources into a session, one after the other, and knows at any time how far it is.

    Args:
        session: what reads. sources: what is read.
        tokenizer: the session's.
    """

    def __init__(
        self, session: Session, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Source]
    ) -> None:
        self.session, self.tokenizer, self.sources = session, tokenizer, tuple(sources)
        self.survey = Survey(tokenizer)
        self._place = Place(began=session.num_tokens)
        self._piece_began = session.num_tokens

    @property
    def tokens(self) -> int:
        """Read so far, before and after an interruption."""
        return self.session.num_tokens - self._place.began

    def read(self, progress: Callable[[float, str], None], after_piece: Callable[[], None]) -> None:
        """Read what is left.

        Args:
            progress: called with the bytes read of all sources, and the name of the one being read.
            after_piece: called where a file that is saved has the survey of all that was read.

        Raises:
            ValueError: for a source that is not valid text for the tokenizer.
        """
        sizes = [source.num_bytes for source in self.sources]
        for source in self.sources:
            _ = source.digest  # of the text before it is read
        for number in range(self._place.file, len(self.sources)):
            source, done = self.sources[number], sum(sizes[:number])
            pieces = read_pieces(source.text, self.tokenizer, begin=self._place.offset, name=source.name)
            for piece in pieces:
                taken, first_token = self._place.taken, self.session.num_tokens
                self._piece_began = first_token - taken
                show = partial(_show, progress, Path(source.name).name, done, piece, taken)
                result = self.session.feed(piece.ids[taken:], collect_surprise=True, progress=show)
                self.survey.add(source.name, piece, taken, first_token, result)
                self._move(number, piece.offset + piece.num_bytes)
                after_piece()
            self._move(number + 1, 0)

    def save(self, path: Path, complete: bool = False) -> None:
        """Write the session to a memory file; unless all is read, with what it takes to go on.

        Raises:
            OSError: if it cannot be written; a file that was there before is not changed.
        """
        place = self._place
        taken = self.session.num_tokens - self._piece_began
        about = {
            "sources": [[source.name, source.num_bytes, source.digest] for source in self.sources],
            "place": asdict(place) | {"taken": taken},
            "survey": self.survey.to_json(),
        }
        self.session.save(path, {} if complete else {_HEADER: json.dumps(about)})

    def resume(self, path: Path) -> None:
        """Go on from where `save` wrote a file of the same sources, which the session was loaded from.

        Raises:
            ValueError: if that file is complete, or of other sources.
        """
        with open_state_file(path) as file:
            if _HEADER not in file.about:
                raise ValueError(f"{path} is complete: there is nothing to resume; leave --resume out")
            try:
                saved = json.loads(file.about[_HEADER])
                before, place = [tuple(source) for source in saved["sources"]], Place(**saved["place"])
                self.survey.restore(saved["survey"])
            except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
                raise damaged_header(path) from None
        now = [(source.name, source.num_bytes, source.digest) for source in self.sources]
        # A file of an earlier version has no digests.
        if [source[:2] for source in before] != [source[:2] for source in now]:
            raise ValueError(
                f"{path} was reading {_named(before)}, and not {_named(now)}: give the same files to go on"
            )
        for then, source in zip(before, now, strict=True):
            if then != source[: len(then)]:
                raise ValueError(
                    f"{source[0]} has changed since {path} began to read it: restore it, or read it anew "
                    "into another file"
                )
        self._place, self._piece_began = place, self.session.num_tokens - place.taken

    def _move(self, file: int, offset: int) -> None:
        self._place = Place(file, offset, 0, self._place.began)
        self._piece_began = self.session.num_tokens


def is_unfinished(path: Path) -> bool:
    """Whether a file is a memory whose reading was cut off."""
    try:
        with open_state_file(path) as file:
            return _HEADER in file.about
    except (OSError, ValueError):
        return False


def _show(
    progress: Callable[[float, str], None], name: str, done: int, piece: Piece, taken: int, count: int
) -> None:
    share = (taken + count) / max(len(piece.ids), 1)
    progress(done + piece.offset + piece.num_bytes * share, name)


def _named(sources: Sequence[tuple[Any, ...]]) -> str:
    return ", ".join(f"{name} ({size:,} bytes)" for name, size, *_ in sources)
