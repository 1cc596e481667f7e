"""Numbers that mean nothing to anybody: lines numbered like verses, in parts of a text. Seeded."""

from __future__ import annotations

import re

import numpy as np

# Bytes of a stretch, log-uniform.
SHORTEST, LONGEST = 500, 16000
_STYLES = ("{n} ", "{n} ", "{n}. ", "({n}) ", "[{n}] ", "{part}:{n} ", "{part}.{n} ", "No. {n}: ")
_MOST_DIGITS = 6
_LINE = re.compile(rb"^(?=[^\s\d])", re.MULTILINE)


def with_numbers(text: bytes, generator: np.random.Generator, share: float) -> bytes:
    """The text with about this share of its lines numbered, stretch by stretch, each in its own style.

    A memory that is to keep a number it is told should not keep every number it reads; plays have hardly any.

    Args:
        share: from 0 to 1.
    """
    if not share:
        return text
    mean = (LONGEST - SHORTEST) / np.log(LONGEST / SHORTEST)
    new, last, begin, end = bytearray(), 0, 0, 0
    style, part, count = "", 0, 0
    for at in (line.start() for line in _LINE.finditer(text)):
        while at >= end:
            begin = end + (int(generator.exponential(mean * (1 - share) / share)) if share < 1 else 0)
            end = begin + int(np.exp(generator.uniform(np.log(SHORTEST), np.log(LONGEST))))
            style, part = _STYLES[generator.integers(len(_STYLES))], int(generator.integers(1, 100))
            # Most counts are short, as they are in books.
            count = int(10 ** (_MOST_DIGITS * generator.random() ** 2))
        if at >= begin:
            new += text[last:at] + style.format(n=count, part=part).encode()
            last, count = at, count + 1
    return bytes(new + text[last:])
