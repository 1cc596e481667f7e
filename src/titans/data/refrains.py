"""Repeated sentences in a training text, which a memory should learn not to store. Seeded."""

from __future__ import annotations

import re

import numpy as np

from titans.data.needles import LINKS, words_of

# Bytes of a refrain, log-uniform, and the most sentences in it.
SHORTEST, LONGEST, MOST_SENTENCES = 200, 8000, 5
_SENTENCE = re.compile(rb"[A-Z][^.!?\n]{10,80}[.!?]")


def with_refrains(text: bytes, generator: np.random.Generator, share: float) -> bytes:
    """The text with refrains inserted: a few sentences, repeated.

    Half of the refrains are sentences of the text. The others have the wording of facts, with words of the
    text ("The night was sweet."), so that wording alone does not mark a fact.

    Args:
        share: approximate share of the new text that is refrains, from 0 to less than 1.
    """
    sentences = _SENTENCE.findall(text)
    if not sentences or not share:
        return text
    words = words_of(text)
    mean = (LONGEST - SHORTEST) / np.log(LONGEST / SHORTEST)
    count = round(len(text) * share / (1 - share) / mean)
    new, last = bytearray(), 0
    for at in np.sort(generator.integers(len(text), size=count)).tolist():
        place = max(text.find(b" ", at) + 1, last)
        count_here = int(generator.integers(1, MOST_SENTENCES + 1))
        if generator.random() < 0.5:
            first = int(generator.integers(len(sentences)))
            refrain = b" ".join(sentences[first : first + count_here]) + b" "
        else:
            link = LINKS[generator.integers(len(LINKS))]
            refrain = "".join(
                f"The {words[generator.integers(len(words))]}{link}{words[generator.integers(len(words))]}. "
                for _ in range(count_here)
            ).encode()
        length = int(np.exp(generator.uniform(np.log(SHORTEST), np.log(LONGEST))))
        new += text[last:place] + refrain * -(-length // len(refrain))
        last = place
    return bytes(new + text[last:])
