"""Have a model read rows side by side, and ask each its own question: answers are generated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from titans.stream.session import reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SPARE_TOKENS = 2


def read(
    model: PreTrainedModel,
    ids: np.ndarray,
    cache: Any = None,
    piece_length: int = 2048,
    tell: Callable[[int], None] | None = None,
) -> tuple[Tensor, Any]:
    """Read on: the logits (rows, vocab) after the last of ids (rows, n), and the cache.

    tell: called after each piece with the tokens of all rows so far.
    """
    logits = None
    for begin in range(0, ids.shape[1], piece_length):
        piece = torch.from_numpy(ids[:, begin : begin + piece_length].astype(np.int64))
        logits, cache = _call(model, piece, cache)
        if tell is not None:
            tell(len(ids) * (begin + piece.shape[1]))
    assert logits is not None, "nothing to read"
    return logits, cache


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: Any,
    questions: Sequence[str],
    answers: Sequence[str],
) -> np.ndarray:
    """Which rows go on from their question with exactly their answer, (rows,) bool; the cache stays as it is.

    Rows whose questions are of one length are asked together.
    """

    def encode(text: str) -> np.ndarray:
        return np.asarray(tokenizer.encode(text, add_special_tokens=False))

    asked = [encode(question) for question in questions]
    right = np.zeros(len(asked), bool)
    for size in {len(question) for question in asked}:
        chosen = [i for i, question in enumerate(asked) if len(question) == size]
        mine = copy.deepcopy(cache)
        if len(chosen) < len(asked):
            mine.batch_select_indices(torch.tensor(chosen))
        wanted = [answers[i] for i in chosen]
        steps = max(len(encode(answer)) for answer in wanted) + _SPARE_TOKENS
        logits, mine = read(model, np.stack([asked[i] for i in chosen]), mine)
        ids = [logits.argmax(-1)]
        for _ in range(steps - 1):
            logits, mine = _call(model, ids[-1].unsqueeze(1), mine)
            ids.append(logits.argmax(-1))
        told = tokenizer.batch_decode(torch.stack(ids, 1))
        right[chosen] = [is_answer(text, answer) for text, answer in zip(told, wanted, strict=True)]
    return right


def is_answer(told: str, answer: str) -> bool:
    """Whether what was generated begins with the answer, and not with a longer word or number."""
    told = told.strip()
    return told.startswith(answer) and not told[len(answer) :][:1].isalnum()


def _call(model: PreTrainedModel, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    with reading(model):
        output = model(
            input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
    return output.logits[:, -1].cpu(), output.past_key_values
