"""Have a model read rows side by side, and ask each its own question: answers are generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from titans.stream.reader import Reader, reader_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SPARE_TOKENS = 2


def read(
    model: PreTrainedModel | Reader,
    ids: np.ndarray,
    cache: Any = None,
    piece_length: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Any]:
    """Read on: the logits (rows, vocab) after the last of ids (rows, n), on the CPU, and the cache.

    cache: of the model's reader, which is changed; None to start. progress: called after each piece with the
    tokens of all rows so far.
    """
    reader, logits = reader_of(model), None
    cache = reader.start() if cache is None else cache
    for begin in range(0, ids.shape[1], piece_length):
        piece = torch.from_numpy(ids[:, begin : begin + piece_length].astype(np.int64))
        logits = reader.read(piece, cache).logits
        if progress is not None:
            progress(len(ids) * (begin + piece.shape[1]))
    assert logits is not None, "nothing to read"
    return logits[:, -1].cpu(), cache


def answered(
    model: PreTrainedModel | Reader,
    tokenizer: PreTrainedTokenizerBase,
    cache: Any,
    questions: Sequence[str],
    answers: Sequence[str],
) -> np.ndarray:
    """Which rows continue their question with exactly their answer, (rows,) bool; the cache is not changed.

    Rows whose questions are of one length are asked together.
    """

    def encode(text: str) -> np.ndarray:
        return np.asarray(tokenizer.encode(text, add_special_tokens=False))

    reader = reader_of(model)
    asked = [encode(question) for question in questions]
    right = np.zeros(len(asked), bool)
    for size in {len(question) for question in asked}:
        chosen = [i for i, question in enumerate(asked) if len(question) == size]
        mine = cache.clone()
        if len(chosen) < len(asked):
            mine.batch_select_indices(torch.tensor(chosen))
        wanted = [answers[i] for i in chosen]
        steps = max(len(encode(answer)) for answer in wanted) + _SPARE_TOKENS
        logits, _ = read(reader, np.stack([asked[i] for i in chosen]), mine)
        ids = [logits.argmax(-1)]
        for _ in range(steps - 1):
            logits, _ = read(reader, ids[-1].unsqueeze(1).numpy(), mine)
            ids.append(logits.argmax(-1))
        given = tokenizer.batch_decode(torch.stack(ids, 1))
        right[chosen] = [is_answer(text, answer) for text, answer in zip(given, wanted, strict=True)]
    return right


def is_answer(text: str, answer: str) -> bool:
    """Whether what was generated begins with the answer, and not with a longer word or number."""
    text = text.strip()
    return text.startswith(answer) and not text[len(answer) :][:1].isalnum()
