"""The six tasks of MAD (Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures"), seeded.

Every function takes a NumPy generator and returns (ids, labels), int64 of shape (batch, time), as in
`titans.data.recall`: labels[t] is the token to predict at ids[t], or −100 where none is scored. Defaults are
MAD's own sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from titans.data.recall import IGNORED

Batch = tuple[Tensor, Tensor]


class MadTask(NamedTuple):
    """A task and the number of ids it uses."""

    make: Callable[[np.random.Generator, int], Batch]
    vocab_size: int


def in_context_recall(
    generator: np.random.Generator,
    batch: int,
    length: int = 128,
    vocab_size: int = 16,
    noise: float = 0.0,
    longest: int = 1,
) -> Batch:
    """Pairs of a key and its value, redrawn for each row; scored is every value whose key occurred before.

    Keys use the first half of the vocabulary, values the second.

    Args:
        noise: share of the tokens that belong to no pair; they use sixteen further ids.
        longest: keys and values have 1 to `longest` tokens; above 1 this is fuzzy recall.
    """
    ids = np.empty((batch, length), np.int64)
    labels = np.full((batch, length), IGNORED, np.int64)
    half = vocab_size // 2
    # A pair takes longest + 1 tokens on average.
    between = noise * (longest + 1) / (1 + noise * longest)
    for row, asked in zip(ids, labels, strict=True):
        found: dict[tuple[int, ...], None] = {}
        while len(found) < half:
            found[_motif(generator, 0, half, longest)] = None
        keys = list(found)
        values = {key: _motif(generator, half, half, longest) for key in keys}
        seen, at = set(), 0
        while at < length:
            if generator.random() < between:
                row[at] = vocab_size + generator.integers(16)
                at += 1
                continue
            key = keys[generator.integers(len(keys))]
            pair = (*key, *values[key])[: length - at]
            row[at : at + len(pair)] = pair
            if key in seen:
                # The first token of the value is predicted at the last of the key.
                first = at + len(key) - 1
                value = pair[len(key) :]
                asked[first : first + len(value)] = value
            seen.add(key)
            at += len(pair)
    return torch.from_numpy(ids), torch.from_numpy(labels)


def selective_copying(
    generator: np.random.Generator, batch: int, length: int = 256, vocab_size: int = 16, count: int = 16
) -> Batch:
    """Tokens among blanks, to be repeated in order at the end, where `count` slots stand for them.

    The last id but one is the blank, the last the slot.

    Raises:
        ValueError: if there is no room.
    """
    if length < 2 * count:
        raise ValueError(f"length={length}: give at least {2 * count}, tokens and slots")
    ids = np.full((batch, length), vocab_size - 2, np.int64)
    labels = np.full((batch, length), IGNORED, np.int64)
    ids[:, -count:] = vocab_size - 1
    for row, asked in zip(ids, labels, strict=True):
        places = np.sort(generator.permutation(length - count)[:count])
        row[places] = asked[-count:] = generator.integers(vocab_size - 2, size=count)
    return torch.from_numpy(ids), torch.from_numpy(labels)


def compression(generator: np.random.Generator, batch: int, length: int = 32, vocab_size: int = 16) -> Batch:
    """Random tokens and then the last id, whose output alone has to encode them all.

    Labels are (batch, length): what a decoder predicts from that output and a position.
    """
    tokens = torch.from_numpy(generator.integers(vocab_size - 1, size=(batch, length)))
    return torch.cat([tokens, tokens.new_full((batch, 1), vocab_size - 1)], 1), tokens


def memorization(
    generator: np.random.Generator, batch: int, length: int = 32, vocab_size: int = 256, seed: int = 0
) -> Batch:
    """Keys, each followed by a slot (the last id) at which its value is scored.

    No row states the values: they follow from `seed`, in training and test alike, and have to be memorised.
    """
    half = (vocab_size - 1) // 2
    values = half + np.random.default_rng(seed).integers(half, size=half)
    keys = generator.integers(half, size=(batch, length // 2))
    ids = np.stack([keys, np.full_like(keys, vocab_size - 1)], -1).reshape(batch, -1)
    labels = np.stack([np.full_like(keys, IGNORED), values[keys]], -1).reshape(batch, -1)
    return torch.from_numpy(ids), torch.from_numpy(labels)


TASKS: dict[str, MadTask] = {
    "compression": MadTask(compression, 16),
    "in-context recall": MadTask(in_context_recall, 16),
    "noisy recall": MadTask(lambda generator, batch: in_context_recall(generator, batch, noise=0.2), 32),
    "fuzzy recall": MadTask(lambda generator, batch: in_context_recall(generator, batch, longest=3), 16),
    "selective copying": MadTask(selective_copying, 16),
    "memorization": MadTask(memorization, 256),
}


def _motif(generator: np.random.Generator, first: int, count: int, longest: int) -> tuple[int, ...]:
    size = int(generator.integers(1, longest + 1))
    return tuple(int(token) for token in first + generator.integers(count, size=size))
