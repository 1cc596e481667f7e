"""How surprising files were to a reader, and where most of all."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from titans.stream.text import decode
from titans.stream.tokenizer import is_byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from titans.stream.reading.pieces import Piece
    from titans.stream.session import FeedResult

WINDOW = 64


@dataclass(frozen=True)
class Peak:
    """The most surprising stretch of tokens: its file, its offset there in bytes, mean surprise,
    beginning."""

    file: str
    offset: int
    surprise: float
    excerpt: str


class Survey:
    """Mean surprise, in all and by file, and where it peaked."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.as_bytes = tokenizer, is_byte_tokenizer(tokenizer)
        self.peak: Peak | None = None
        self.files: dict[str, tuple[float, int]] = {}

    def add(self, name: str, piece: Piece, taken: int, first_token: int, result: FeedResult) -> None:
        """Take note of what a piece has caused, without its first `taken` tokens; the next one is the
        session's `first_token`."""
        if result.surprises is None:
            return
        # The first row may belong to the token before the piece.
        per_token = result.surprises.mean(-1)[first_token - result.start :]
        total, count = self.files.get(name, (0.0, 0))
        self.files[name] = total + float(per_token.double().sum()), count + len(per_token)
        whole = len(per_token) // WINDOW * WINDOW
        if not whole:
            return
        means = per_token[:whole].view(-1, WINDOW).mean(-1)
        highest = int(means.argmax())
        if self.peak is None or float(means[highest]) > self.peak.surprise:
            begin = taken + highest * WINDOW
            before, there = piece.ids[:begin], piece.ids[begin : begin + WINDOW]
            offset = begin if self.as_bytes else len(decode(self.tokenizer, before).encode())
            excerpt = " ".join(decode(self.tokenizer, there).split())
            self.peak = Peak(name, piece.offset + offset, float(means[highest]), excerpt)

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON; None for a model without a memory."""
        total = sum(total for total, _ in self.files.values())
        count = sum(count for _, count in self.files.values())
        return {
            "mean_surprise": total / count if count else None,
            "peak": asdict(self.peak) if self.peak else None,
            "files": {name: total / count for name, (total, count) in self.files.items() if count},
        }

    def to_json(self) -> dict[str, Any]:
        """All there is to go on from."""
        return {"peak": asdict(self.peak) if self.peak else None, "files": self.files}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `to_json` gave."""
        self.peak = Peak(**saved["peak"]) if saved["peak"] else None
        self.files = {
            str(name): (float(total), int(count)) for name, (total, count) in saved["files"].items()
        }
