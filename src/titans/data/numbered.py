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
    new, last = bytearray(), 0
    while last < len(text):
        numbered = int(np.exp(generator.uniform(np.log(SHORTEST), np.log(LONGEST))))
        plain = int(generator.exponential(mean * (1 - share) / share)) if share < 1 else 0
        new += text[last : last + plain]
        last += plain
        style = _STYLES[generator.integers(len(_STYLES))]
        part = int(generator.integers(1, 100))
        # Most counts are short, as they are in books.
        first = int(10 ** (_MOST_DIGITS * generator.random() ** 2))
        stretch, count = text[last : last + numbered], 0

        def number(_: re.Match[bytes], style: str = style, part: int = part, first: int = first) -> bytes:
            nonlocal count
            count += 1
            return style.format(n=first + count - 1, part=part).encode()

        new += _LINE.sub(number, stretch)
        last += numbered
    return bytes(new)
