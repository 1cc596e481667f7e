"""The least that a trained model must beat: an interpolated n-gram model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Level:
    """Counts of all n-grams of one length, each coded as a number in base vocab_size, its last token last."""

    grams: np.ndarray  # sorted codes
    gram_counts: np.ndarray
    contexts: np.ndarray  # sorted codes of the n-grams without their last token
    context_counts: np.ndarray
    continuations: np.ndarray  # number of different tokens seen after each context


class InterpolatedNgram:
    """An n-gram model whose orders are interpolated with Witten-Bell weights.

        P_n(w | h) = (count(h w) + T(h) P_{n-1}(w | h')) / (count(h) + T(h))

    T(h) is the number of different tokens seen after the context h, h' is h without its oldest token, and P_0
    is uniform over the vocabulary. The weight of each order follows from the training text, and no token has
    probability 0. No n-gram spans two documents.

    Raises ValueError when vocab_size ** order does not fit 63 bits.
    """

    def __init__(self, order: int = 3, vocab_size: int = 256) -> None:
        if order < 1 or vocab_size < 1 or vocab_size**order >= 2**63:
            raise ValueError(
                f"order={order} with vocab_size={vocab_size} is out of range: both must be at least 1 and "
                "vocab_size ** order below 2 ** 63"
            )
        self.order = order
        self.vocab_size = vocab_size
        self._levels: list[_Level] = []

    def fit(self, documents: np.ndarray | Sequence[np.ndarray]) -> InterpolatedNgram:
        """Count the n-grams of one document or several, each of shape (tokens,); returns self."""
        checked = self._check(documents)
        self._levels = []
        for length in range(1, self.order + 1):
            codes = np.concatenate([self._codes(document, length) for document in checked])
            grams, gram_counts = np.unique(codes, return_counts=True)
            contexts, first, continuations = np.unique(
                grams // self.vocab_size, return_index=True, return_counts=True
            )
            context_counts = np.add.reduceat(gram_counts, first) if len(first) else first
            self._levels.append(_Level(grams, gram_counts, contexts, context_counts, continuations))
        return self

    def token_bits(self, document: np.ndarray) -> np.ndarray:
        """-log2 of the probability of every token given those before it, shape (tokens,).

        Near the beginning of the document, where the context is shorter, only the lower orders take part.
        """
        if not self._levels:
            raise ValueError("the model has no counts yet: call fit first")
        (tokens,) = self._check([document])
        probability = np.full(len(tokens), 1 / self.vocab_size)
        for length, level in enumerate(self._levels, start=1):
            codes = self._codes(tokens, length)
            gram_count = _look_up(level.grams, level.gram_counts, codes)
            contexts = codes // self.vocab_size
            context_count = _look_up(level.contexts, level.context_counts, contexts)
            types = _look_up(level.contexts, level.continuations, contexts)
            lower = probability[length - 1 :]
            seen = context_count > 0
            mixed = (gram_count + types * lower) / np.maximum(context_count + types, 1)
            probability[length - 1 :] = np.where(seen, mixed, lower)
        return -np.log2(probability)

    def bits_per_token(self, documents: np.ndarray | Sequence[np.ndarray]) -> float:
        """Mean bits over all tokens but the first of each document, as a causal model predicts them."""
        bits = np.concatenate([self.token_bits(document)[1:] for document in self._check(documents)])
        if not len(bits):
            raise ValueError(
                "documents holds no token with another before it, so there is nothing to predict"
            )
        return float(bits.mean())

    def _check(self, documents: np.ndarray | Sequence[np.ndarray]) -> list[np.ndarray]:
        listed = [documents] if isinstance(documents, np.ndarray) else list(documents)
        for number, document in enumerate(listed):
            if document.ndim != 1 or document.dtype.kind not in "iu":
                raise ValueError(
                    f"documents[{number}] has shape {document.shape} and dtype {document.dtype}; "
                    "give token ids as a one-dimensional array of integers"
                )
            if len(document) and not 0 <= int(document.min()) <= int(document.max()) < self.vocab_size:
                raise ValueError(f"documents[{number}] has token ids outside 0..{self.vocab_size - 1}")
        if not sum(map(len, listed)):
            raise ValueError("documents holds no tokens")
        return listed

    def _codes(self, tokens: np.ndarray, length: int) -> np.ndarray:
        """Code of the n-gram that ends at each token from number length - 1 on."""
        count = max(len(tokens) - length + 1, 0)
        codes = np.zeros(count, dtype=np.int64)
        for offset in range(length):
            codes = codes * self.vocab_size + tokens[offset : offset + count]
        return codes


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[i] where keys[i] is the wanted key, 0 where there is none; keys are sorted."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=values.dtype)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
