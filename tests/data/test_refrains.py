from __future__ import annotations

import numpy as np
import pytest

from titans.data.needles import LINKS
from titans.data.refrains import with_refrains

WORDS = ["the", "king", "went", "house", "and", "saw", "a", "great", "fire", "on", "his", "hill"]


def a_text(sentences: int) -> bytes:
    generator = np.random.default_rng(0)
    return " ".join(
        " ".join(generator.choice(WORDS, 8)).capitalize() + "." for _ in range(sentences)
    ).encode()


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_a_share_of_the_text_is_repeated_sentences_and_the_rest_is_unchanged(share: float) -> None:
    text = a_text(20_000)
    new = with_refrains(text, np.random.default_rng(1), share)
    assert 1 - len(text) / len(new) == pytest.approx(share, abs=0.05)
    assert new == with_refrains(text, np.random.default_rng(1), share)
    place = 0
    for word in text.split():
        place = new.find(word, place) + len(word)
        assert place >= len(word), "a word is missing"
    sentences = new.split(b". ")
    again = [one for i, one in enumerate(sentences) if one in sentences[i + 1 : i + 6]]
    assert len(again) / len(sentences) > share / 2
    kinds = [any(link.encode() in one for link in LINKS) for one in again]
    assert 0.2 < sum(kinds) / len(kinds) < 0.9


def test_a_text_without_sentences_has_no_refrains() -> None:
    assert with_refrains(b"no end in sight " * 50, np.random.default_rng(0), 0.5) == b"no end in sight " * 50
