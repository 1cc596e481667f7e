"""Documents that pretrained models read in experiments, and that no training uses."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path

from titans.data import load_corpus
from titans.experiments.runner import say

PLAY, CODE, BOOK = "King Lear", "Python source", "Moby Dick"
SPEECHES, ESSAYS = "State of the Union", "Essays"
# Earlier addresses, and the essays before this one, are texts of training.
FIRST_ADDRESS, FIRST_ESSAYS = "2000", "essays-035"


def documents() -> dict[str, Callable[[], str]]:
    """Name → text, of those that can be had; a line on stderr names each other one and how to get it.

    King Lear; Moby Dick from its character 75,000 on; the addresses on the State of the Union from 2000 on;
    the last third of Paul Graham's essays; and the module argparse of the Python that runs this.
    """
    makers = {PLAY: _play, ESSAYS: _essays, SPEECHES: _speeches, BOOK: _book, CODE: _code}
    return {name: make for name, make in makers.items() if _there(name, make)}


@cache
def _there(name: str, make: Callable[[], str]) -> bool:
    try:
        make()
    except (ConnectionError, ValueError) as error:
        say(f"{name} is left out: {error}")
        return False
    return True


@cache
def _play() -> str:
    return next(d.data for d in load_corpus("shakespeare") if d.name == "king-lear").decode()


@cache
def _essays() -> str:
    return "".join(d.data.decode() for d in load_corpus("essays") if d.name >= FIRST_ESSAYS)


@cache
def _speeches() -> str:
    found = load_corpus("state-of-the-union")
    return "\n\n".join(d.data.decode() for d in found if d.name[:4] >= FIRST_ADDRESS)


@cache
def _book() -> str:
    return load_corpus("moby-dick")[0].data.decode()[75_000:]


def _code() -> str:
    return Path(argparse.__file__).read_text(encoding="utf-8")


def tempest() -> str:
    """The Tempest, which comes with the library."""
    return "".join(document.data.decode() for document in load_corpus("excerpt"))
