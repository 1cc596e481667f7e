"""Recall tasks, generated on demand: a passkey in filler, and associative recall of pairs. Seeded.

Every function takes a NumPy generator and returns (ids, labels), int64 of shape (batch, time): labels[t] is
the token to predict at ids[t], or −100 where none is scored.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from titans.data.needles import FILLER

IGNORED = -100
NUM_KEYS, NUM_VALUES = 256, 64
_FILLER = np.frombuffer(FILLER.encode(), np.uint8)
_CUE = b"The pass key="
_REMINDER = b". Remember it. "
_QUESTION = b"What is the pass key? "


def passkey(
    generator: np.random.Generator, batch: int, length: int, num_digits: int = 5
) -> tuple[Tensor, Tensor]:
    """Bytes: filler with the key stated at a random place and asked for at the end.

    Raises:
        ValueError: if `length` has no room for statement and question.
    """
    rows = []
    for _ in range(batch):
        key = _digits(generator, num_digits)
        statement, question = _CUE + key + _REMINDER, _QUESTION + _CUE + key
        room = length + 1 - len(statement) - len(question)
        if room < 0:
            raise ValueError(
                f"length={length}: give at least {length - room}, the length of statement and question"
            )
        filler, at = _filler(generator, room), int(generator.integers(room + 1))
        rows.append(filler[:at] + statement + filler[at:] + question)
    ids = _stack(rows)
    labels = torch.full_like(ids[:, 1:], IGNORED)
    labels[:, -num_digits:] = ids[:, -num_digits:]
    return ids[:, :-1], labels


def restated_passkey(
    generator: np.random.Generator, batch: int, length: int, num_digits: int = 5, longest_gap: int = 60
) -> tuple[Tensor, Tensor]:
    """Bytes: the key stated once, then asked for and answered repeatedly, with filler between.

    It trains the same recall in the same words as `passkey`, with many scored digits per row instead of few.
    """
    rows, asked = [], []
    for _ in range(batch):
        key, marks = _digits(generator, num_digits), []
        row = _filler(generator, int(generator.integers(longest_gap))) + _CUE + key + _REMINDER
        while len(row) <= length:
            row += _filler(generator, int(generator.integers(longest_gap))) + _QUESTION + _CUE
            marks += range(len(row), len(row) + num_digits)
            row += key + b". "
        rows.append(row[: length + 1])
        asked.append([mark for mark in marks if mark <= length])
    ids = _stack(rows)
    labels = torch.full_like(ids[:, 1:], IGNORED)
    for row, marks in enumerate(asked):
        for mark in marks:
            labels[row, mark - 1] = ids[row, mark]
    return ids[:, :-1], labels


def associative_recall(
    generator: np.random.Generator, batch: int, num_pairs: int, num_queries: int, num_keys: int = NUM_KEYS
) -> tuple[Tensor, Tensor]:
    """Pairs of a key (0 … num_keys − 1, each once) and a value (one of the 64 ids after these), then the keys
    again in random order, each asked for its value and followed by it: 2 (num_pairs + num_queries) tokens.
    One round follows another.

    Raises:
        ValueError: for more pairs than there are keys.
    """
    if num_pairs > num_keys:
        raise ValueError(f"num_pairs={num_pairs}: give at most num_keys={num_keys}")
    rows = np.empty((batch, num_pairs + num_queries, 2), np.int64)
    for row in rows:
        row[:num_pairs, 0] = generator.permutation(num_keys)[:num_pairs]
        row[:num_pairs, 1] = num_keys + generator.integers(NUM_VALUES, size=num_pairs)
        rounds = [generator.permutation(num_pairs) for _ in range(-(-num_queries // num_pairs))]
        row[num_pairs:] = row[np.concatenate(rounds)[:num_queries]]
    labels = np.full_like(rows, IGNORED)
    labels[:, num_pairs:, 0] = rows[:, num_pairs:, 1]
    return torch.from_numpy(rows.reshape(batch, -1)), torch.from_numpy(labels.reshape(batch, -1))


def _digits(generator: np.random.Generator, count: int) -> bytes:
    return bytes(generator.integers(ord("0"), ord("9") + 1, count).astype(np.uint8))


def _filler(generator: np.random.Generator, length: int) -> bytes:
    return np.resize(np.roll(_FILLER, -int(generator.integers(len(_FILLER)))), length).tobytes()


def _stack(rows: list[bytes]) -> Tensor:
    return torch.from_numpy(np.stack([np.frombuffer(row, np.uint8) for row in rows]).astype(np.int64))
