"""State tracking: parity, and words of the group S5. Seeded.

Every function takes a NumPy generator and returns (ids, labels), int64 of shape (batch, time), as in
`titans.data.recall`; every label is scored. A model of finite precision in TC0 cannot do S5 at all lengths
(Merrill, Petty and Sabharwal 2024, "The Illusion of State in State-Space Models").
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import torch
from torch import Tensor

from titans.data.mad import MadTask


def parity(generator: np.random.Generator, batch: int, length: int = 64) -> tuple[Tensor, Tensor]:
    """Bits, and at each the parity of all so far."""
    bits = generator.integers(2, size=(batch, length))
    return torch.from_numpy(bits), torch.from_numpy(bits.cumsum(1) % 2)


def permutations(generator: np.random.Generator, batch: int, length: int = 32) -> tuple[Tensor, Tensor]:
    """Elements of S5, of 120, and at each the product of all so far."""
    table = _products()
    ids = generator.integers(len(table), size=(batch, length))
    labels = np.empty_like(ids)
    product = np.zeros(batch, np.int64)  # the first element is the identity
    for t in range(length):
        product = labels[:, t] = table[ids[:, t], product]
    return torch.from_numpy(ids), torch.from_numpy(labels)


@cache
def _products() -> np.ndarray:
    """(120, 120): the number of a ∘ b, permutations of five in lexicographic order."""
    elements = [*itertools.permutations(range(5))]
    number = {element: i for i, element in enumerate(elements)}
    return np.array([[number[tuple(a[i] for i in b)] for b in elements] for a in elements])


STATE_TRACKING: dict[str, MadTask] = {
    "parity": MadTask(parity, 2),
    "permutations of five": MadTask(permutations, 120),
}
