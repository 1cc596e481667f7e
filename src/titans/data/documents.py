"""Documents, the items of a corpus."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text that is read from beginning to end; a memory never carries over from one to another.

    `name` is unique within its corpus and decides whether the document is held out; `data` is the raw text in
    any encoding.
    """

    name: str
    data: bytes
