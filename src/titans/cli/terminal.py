"""Text on its way to a terminal, which obeys control characters, and may not know every letter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# C0 and C1 without tab and line feed.
_CONTROLS = [*range(9), *range(11, 32), *range(127, 160)]
# Marks that turn the direction of what follows.
_DIRECTIONS = [0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {c: f"\\x{c:02x}" for c in _CONTROLS} | {c: f"\\u{c:04x}" for c in _DIRECTIONS}


def printable(text: str) -> str:
    """The text with its control characters written out, such as \\x1b; tabs and line ends stay."""
    return text.translate(_ESCAPES)


def report(text: str) -> None:
    """Write a line about the work to stderr."""
    print(printable(text), file=sys.stderr)


@contextmanager
def any_letter_is_shown() -> Iterator[None]:
    """Letters that stdout's encoding lacks are written out instead of ending the command."""
    stdout = sys.stdout
    if not isinstance(stdout, TextIOWrapper) or stdout.errors != "strict":
        yield
        return
    stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        if not stdout.closed:
            stdout.reconfigure(errors="strict")


def text_streamer(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Writes new text to stdout as it is generated: made printable on a terminal, unchanged elsewhere."""
    from transformers import TextStreamer

    class Printable(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text) if sys.stdout.isatty() else text, stream_end)

    return Printable(tokenizer, skip_prompt=True)
