"""What a corpus is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text that is read from beginning to end; a memory never crosses from one into another.

    `name` is unique within its corpus and decides what is held out; `data` is the raw text, any encoding.
    """

    name: str
    data: bytes
