"""MAD's tasks, each solved by someone who knows its rule, and by no one who knows less."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from titans.data.mad import TASKS, compression, in_context_recall, memorization, selective_copying
from titans.data.recall import IGNORED


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_the_same_rows_within_the_vocabulary(name):
    task = TASKS[name]
    (ids, labels), again, other = task.make(rng(1), 20), task.make(rng(1), 20), task.make(rng(2), 20)
    assert torch.equal(ids, again[0]) and torch.equal(labels, again[1]) and not torch.equal(ids, other[0])
    assert ids.dtype == labels.dtype == torch.int64
    assert ids.min() >= 0 and ids.max() < task.vocab_size
    wanted = labels[labels != IGNORED]
    assert len(wanted) >= 20 and wanted.min() >= 0 and wanted.max() < task.vocab_size


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_recall_asks_for_what_followed_the_key_before(noise):
    ids, labels = in_context_recall(rng(), 50, noise=noise)
    assert (ids >= 16).float().mean().item() == pytest.approx(noise, abs=0.02)
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        known = {}
        for now, following, wanted in zip(row, row[1:], asked, strict=False):
            if now < 8:
                assert wanted == known.get(now, IGNORED)
                known[now] = following
            else:
                assert wanted == IGNORED
        assert len(known) > 3


def test_fuzzy_recall_asks_for_every_token_of_a_value_whose_key_was_there():
    ids, labels = in_context_recall(rng(), 50, longest=3)
    sizes = set()
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        at, known = 0, {}
        while at < len(row):
            begin = at
            while at < len(row) and row[at] < 8:
                at += 1
            key, middle = tuple(row[begin:at]), at
            while at < len(row) and row[at] >= 8:
                at += 1
            value = row[middle:at]
            if at < len(row):
                sizes |= {len(key), len(value)}
            value_ids = asked[middle - 1 : at - 1]
            if key in known:
                assert value_ids == value == known[key][: len(value)]
            elif at < len(row):
                assert set(value_ids) <= {IGNORED}
                known[key] = value
    assert sizes == {1, 2, 3}


def test_selective_copying_asks_for_the_tokens_that_are_not_blank():
    ids, labels = selective_copying(rng(), 30)
    for row, asked in zip(ids, labels, strict=True):
        assert torch.equal(row[:-16][row[:-16] < 14], asked[-16:]) and (asked[:-16] == IGNORED).all()
        assert (row[-16:] == 15).all()
    with pytest.raises(ValueError, match="length=20: give at least 32"):
        selective_copying(rng(), 1, length=20)


def test_compression_and_memorization():
    ids, labels = compression(rng(), 10)
    assert torch.equal(ids[:, :-1], labels) and (ids[:, -1] == 15).all()
    ids, labels = memorization(rng(), 200)
    others, wanted = memorization(rng(7), 200)
    pairs = {}
    for keys, values in ((ids, labels), (others, wanted)):
        assert (values[:, ::2] == IGNORED).all() and (keys[:, 1::2] == 255).all()
        for key, value in zip(
            keys[:, ::2].flatten().tolist(), values[:, 1::2].flatten().tolist(), strict=True
        ):
            assert pairs.setdefault(key, value) == value
    assert len(pairs) == 127
