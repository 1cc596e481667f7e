"""`titans memorize`."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from titans.cli.errors import UsageError
from titans.cli.outputs import check_output
from titans.zoo.checkpoint import load_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from titans.cli.progress import ReadingProgress
    from titans.data.pieces import Piece
    from titans.stream import FeedResult, Session

SURPRISE_WINDOW = 64


@dataclass(frozen=True)
class Memorize:
    """Read files into a memory, in the order given, and save it.

    Example: titans memorize runs/tempest book.txt notes.txt -o book.memory

    Files may have any length: memory use does not grow. Ctrl-C saves what has been read so far.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Folder of a model, as `titans train` leaves it."""
    files: tyro.conf.Positional[tuple[Path, ...]]
    """Texts to read, one after the other."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """File to write the memory to."""
    memory: Path | None = None
    """Go on from this memory instead of an empty one."""
    json: bool = False
    """Print a summary as one JSON object."""

    def run(self) -> int:
        """Read and save, reporting to stderr."""
        check_output("output", self.output)
        if not self.files:
            raise UsageError("files: none given; name the texts to read before -o")
        sizes = [_size(path) for path in self.files]
        from titans.cli.progress import ReadingProgress
        from titans.stream import Session

        model, tokenizer = load_checkpoint(self.checkpoint)
        session = Session.load(self.memory, model, tokenizer) if self.memory else Session(model, tokenizer)
        tokens_before, began, survey = session.num_tokens, time.perf_counter(), _Survey(tokenizer)
        try:
            with ReadingProgress(sum(sizes)) as progress:
                for index, path in enumerate(self.files):
                    _read_file(session, tokenizer, path, sum(sizes[:index]), tokens_before, progress, survey)
        except KeyboardInterrupt:
            tokens = session.num_tokens - tokens_before
            if not tokens:
                raise KeyboardInterrupt("interrupted before anything was read; nothing is saved") from None
            session.save(self.output)
            raise KeyboardInterrupt(
                f"interrupted; {self.output} holds the {tokens:,} tokens read until then"
            ) from None
        seconds, tokens = time.perf_counter() - began, session.num_tokens - tokens_before
        session.save(self.output)
        summary = {
            "output": str(self.output),
            "tokens": tokens,
            "tokens_in_memory": session.num_tokens,
            "bytes": sum(sizes),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "state_bytes": session.stats().state_bytes,
            **survey.summary(),
        }
        _report(summary)
        if self.json:
            print(json.dumps(summary))
        return 0


@dataclass(frozen=True)
class _Peak:
    """The most surprising stretch of tokens: its file, its offset there in bytes, mean surprise,
    beginning."""

    file: str
    offset: int
    surprise: float
    excerpt: str


class _Survey:
    """Mean surprise, in all and by file, and where it peaked."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from titans.data import is_byte_tokenizer

        self.tokenizer, self.as_bytes = tokenizer, is_byte_tokenizer(tokenizer)
        self.peak: _Peak | None = None
        self.files: dict[str, tuple[float, int]] = {}

    def add(self, path: Path, piece: Piece, first_token: int, result: FeedResult) -> None:
        """Take note of what a piece, whose first token is the session's `first_token`, has caused."""
        if result.surprises is None:
            return
        # The first row may belong to the token before the piece.
        per_token = result.surprises.mean(-1)[first_token - result.start :]
        total, count = self.files.get(str(path), (0.0, 0))
        self.files[str(path)] = total + float(per_token.double().sum()), count + len(per_token)
        whole = len(per_token) // SURPRISE_WINDOW * SURPRISE_WINDOW
        if not whole:
            return
        means = per_token[:whole].view(-1, SURPRISE_WINDOW).mean(-1)
        from titans.stream.text import decode

        highest = int(means.argmax())
        if self.peak is None or float(means[highest]) > self.peak.surprise:
            begin = highest * SURPRISE_WINDOW
            before, there = piece.ids[:begin], piece.ids[begin : begin + SURPRISE_WINDOW]
            offset = begin if self.as_bytes else len(decode(self.tokenizer, before).encode())
            excerpt = " ".join(decode(self.tokenizer, there).split())
            self.peak = _Peak(str(path), piece.offset + offset, float(means[highest]), excerpt)

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON; None for a model without a memory."""
        total = sum(total for total, _ in self.files.values())
        count = sum(count for _, count in self.files.values())
        return {
            "mean_surprise": total / count if count else None,
            "peak": asdict(self.peak) if self.peak else None,
            "files": {path: total / count for path, (total, count) in self.files.items() if count},
        }


def _size(path: Path) -> int:
    """Bytes of a file that can be read.

    Raises:
        ValueError: if there is none, or nothing in it.
    """
    if not path.is_file():
        raise ValueError(
            f"files: {str(path)!r} is not a file: name the files to read, folders are not opened"
        )
    try:
        with path.open("rb"):
            size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"files: {str(path)!r} could not be read ({error.strerror})") from None
    if not size:
        raise ValueError(f"files: {str(path)!r} is empty: leave it out")
    return size


def _read_file(
    session: Session,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    bytes_before: int,
    tokens_before: int,
    progress: ReadingProgress,
    survey: _Survey,
) -> None:
    from titans.data.pieces import read_pieces

    for piece in read_pieces(path, tokenizer):
        first_token = session.num_tokens

        def show(taken: int, piece: Piece = piece) -> None:
            done = bytes_before + piece.offset + piece.num_bytes * taken / len(piece.ids)
            progress.update(done, session.num_tokens - tokens_before, path.name)

        result = session.feed(piece.ids, collect_surprise=True, progress=show)
        survey.add(path, piece, first_token, result)


def _report(summary: dict[str, Any]) -> None:
    lines = [
        f"{summary['output']} holds {summary['tokens_in_memory']:,} tokens in "
        f"{summary['state_bytes']:,} bytes; {summary['tokens_per_second']:,.0f} tokens/s"
    ]
    if summary["mean_surprise"] is not None:
        lines.append(f"surprise: mean {summary['mean_surprise']:.4f}")
    if peak := summary["peak"]:
        lines.append(
            f"  peak {peak['surprise']:.4f} in {peak['file']} at byte {peak['offset']:,}: {peak['excerpt']}"
        )
    print("\n".join(lines), file=sys.stderr)
