"""Numbered lines, as in editions of plays and laws: numbers that no question asks for. Seeded."""

from __future__ import annotations

import numpy as np

# Bytes of a numbered stretch, log-uniform, and the most lines from one number to the next.
SHORTEST, LONGEST, MOST_LINES = 500, 8000, 4
_STYLES = (
    "{n} ",
    "{n}. ",
    "({n}) ",
    "[{n}] ",
    "{n}: ",
    "§{n} ",
    "{chapter}.{n} ",
    "No. {n}, ",
    "p. {n}\n",
    "[{year}] ",
)


def with_numbered_lines(text: bytes, generator: np.random.Generator, share: float) -> bytes:
    """The text with numbers before some lines, in stretches.

    A memory trained on text without numbers learns to store every digit, as if it were a fact.

    Args:
        share: approximate share of the text that lies in such stretches, from 0 to less than 1.
    """
    if not share:
        return text
    mean = (LONGEST - SHORTEST) / np.log(LONGEST / SHORTEST)
    between = mean * (1 - share) / share
    new, place = bytearray(), 0
    while place < len(text):
        begin = place + int(generator.exponential(between))
        end = begin + int(np.exp(generator.uniform(np.log(SHORTEST), np.log(LONGEST))))
        new += text[place:begin]
        new += _numbered(text[begin:end], generator)
        place = end
    return bytes(new)


def _numbered(text: bytes, generator: np.random.Generator) -> bytes:
    style = _STYLES[generator.integers(len(_STYLES))]
    number, every = (
        int(np.exp(generator.uniform(0, np.log(3000)))),
        int(generator.integers(1, MOST_LINES + 1)),
    )
    chapter = int(generator.integers(1, 40))
    lines = text.split(b"\n")
    for index in range(1, len(lines), every):
        label = style.format(n=number, chapter=chapter, year=1400 + number % 600)
        lines[index] = label.encode() + lines[index]
        number += 1 if generator.random() < 0.8 else int(generator.integers(1, 30))
    return b"\n".join(lines)
