"""Recall tasks: every answer was stated before, and nothing else reveals it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from titans.data.recall import IGNORED, NUM_KEYS, associative_recall, passkey, restated_passkey


def text_of(ids: torch.Tensor, labels: torch.Tensor) -> str:
    """A row with the token after its last."""
    return bytes([*ids.tolist(), *labels[-1:].clamp_min(0).tolist()]).decode()


@pytest.mark.parametrize("length", [120, 512])
def test_a_passkey_is_stated_once_and_asked_at_the_end(length):
    ids, labels = passkey(np.random.default_rng(0), 20, length)
    assert ids.shape == labels.shape == (20, length)
    places = set()
    for row, asked in zip(ids, labels, strict=True):
        text = text_of(row, asked)
        key = "".join(map(chr, asked[asked != IGNORED].tolist()))
        assert len(key) == 5 and (asked != IGNORED).nonzero().flatten().tolist() == list(
            range(length - 5, length)
        )
        assert text.endswith(f"What is the pass key? The pass key={key}")
        assert re.findall(r"pass key=(\d+)\. Remember", text) == [key] and text.count(key) == 2
        places.add(text.index(key))
    assert len(places) > 10, "the statement is always at the same depth"
    again = passkey(np.random.default_rng(0), 20, length)
    assert torch.equal(again[0], ids) and not torch.equal(
        passkey(np.random.default_rng(1), 20, length)[0], ids
    )


def test_a_row_too_short_for_a_passkey_is_refused():
    with pytest.raises(ValueError, match="length=40: give at least 72"):
        passkey(np.random.default_rng(0), 1, 40)
    passkey(np.random.default_rng(0), 1, 72)


def test_every_restatement_is_asked_for_in_the_words_of_the_test():
    ids, labels = restated_passkey(np.random.default_rng(0), 50, 160)
    words = {
        c
        for row, asked in zip(*passkey(np.random.default_rng(0), 99, 256), strict=True)
        for c in text_of(row, asked)
    }
    assert {c for row, asked in zip(ids, labels, strict=True) for c in text_of(row, asked)} - {"\0"} == words
    for row, asked in zip(ids, labels, strict=True):
        text = text_of(row, asked)
        first, *others = re.finditer(r"key=(\d{1,5})", text)
        expected = {t for m in others for t in range(m.start(1), min(m.end(1), 160))}
        # The label after the last token is in the row's own text only if it is a digit.
        marks = {t + 1 for t in (asked != IGNORED).nonzero().flatten().tolist()}
        assert marks - {160} == expected
        assert all(asked[t - 1] == ord(first[1][(t - text.rindex("=", 0, t)) - 1]) for t in marks)


def test_every_query_has_the_value_of_its_key():
    ids, labels = associative_recall(np.random.default_rng(0), 8, 30, 70)
    assert ids.shape == (8, 200)
    for row, asked in zip(ids.view(8, -1, 2).tolist(), labels.view(8, -1, 2).tolist(), strict=True):
        known = dict(row[:30])
        assert len(known) == 30 and all(k < NUM_KEYS <= v < NUM_KEYS + 64 for k, v in known.items())
        assert all(value == known[key] for key, value in row[30:])
        assert [a[0] for a in asked] == [IGNORED] * 30 + [v for _, v in row[30:]]
        assert {a[1] for a in asked} == {IGNORED}
        assert sorted(k for k, _ in row[30:60]) == sorted(known)
    many, _ = associative_recall(np.random.default_rng(0), 2, 1000, 10, num_keys=1024)
    assert len(set(many[0, :2000:2].tolist())) == 1000 and many[:, 1::2].min() >= 1024
    with pytest.raises(ValueError, match="num_pairs=257: give at most num_keys=256"):
        associative_recall(np.random.default_rng(0), 1, 257, 1)
