"""Sentences of a text said again and again in it: what a memory should not fill up with. Seeded."""

from __future__ import annotations

import re

import numpy as np

# Bytes of a refrain, log-uniform, and sentences that it repeats.
SHORTEST, LONGEST, MOST_SENTENCES = 200, 4000, 5
_SENTENCE = re.compile(rb"[A-Z][^.!?\n]{10,80}[.!?]")


def with_refrains(text: bytes, generator: np.random.Generator, share: float) -> bytes:
    """The text with refrains between its words: a few of its sentences, repeated.

    Args:
        share: of the new text that is refrains, about; from 0 to less than 1.
    """
    sentences = _SENTENCE.findall(text)
    if not sentences or not share:
        return text
    mean = (LONGEST - SHORTEST) / np.log(LONGEST / SHORTEST)
    count = round(len(text) * share / (1 - share) / mean)
    new, last = bytearray(), 0
    for at in np.sort(generator.integers(len(text), size=count)).tolist():
        place = max(text.find(b" ", at) + 1, last)
        first = int(generator.integers(len(sentences)))
        said = b" ".join(sentences[first : first + int(generator.integers(1, MOST_SENTENCES + 1))]) + b" "
        length = int(np.exp(generator.uniform(np.log(SHORTEST), np.log(LONGEST))))
        new += text[last:place] + said * -(-length // len(said))
        last = place
    return bytes(new + text[last:])
