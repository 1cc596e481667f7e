"""Between what a session is given or gives, text or bytes or ids, and the token ids that a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

# Enough to decode the text that follows: more tokens than one character of UTF-8 can take.
NUM_RECENT = 8
# All 1-, 2-, 3- and 4-byte forms, and a blank at either end that a tokenizer might drop.
_PROBE = " a\x00\nÿ€😀 "


def token_ids(
    text: str | bytes | Tensor | Sequence[int] | np.ndarray,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
) -> Tensor:
    """(n,) token ids on the CPU, of any integer type; see `Session.feed`.

    Raises:
        ValueError: for a string without a tokenizer, bytes that are not UTF-8, other shapes, or foreign ids.
    """
    if isinstance(text, str) and tokenizer is None:
        raise ValueError("text is a string, but the session has no tokenizer: pass one, or feed token ids")
    if isinstance(text, bytes):
        if tokenizer is None or _reads_bytes(tokenizer):
            text = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else []
        else:
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"text is not valid UTF-8 at byte {error.start}: convert it, or use a byte tokenizer"
                ) from None
    if isinstance(text, str):
        assert tokenizer is not None
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text holds half a character, {text[error.start]!r}, at index {error.start}: give whole "
                "ones, or bytes"
            ) from None
        text = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    ids = text if isinstance(text, Tensor) else torch.tensor(text)
    if not ids.numel():
        return torch.zeros(0, dtype=torch.int64)
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1 or ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"token ids have shape {tuple(ids.shape)} and dtype {ids.dtype}: give integers (n,)")
    ids = ids.cpu() if ids.dtype in (torch.uint8, torch.int32) else ids.cpu().long()
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token id {low if low < 0 else high} is outside the model's vocabulary of {vocab_size}: "
            "use the tokenizer the model was trained with"
        )
    return ids


def text_after(tokenizer: PreTrainedTokenizerBase, recent: tuple[int, ...], new: tuple[int, ...]) -> str:
    """The text of new tokens after recent ones, without an incomplete character at its end.

    It is cut from their common text, so that no tokenizer can treat it as a beginning; what was incomplete in
    the recent ones comes first.
    """
    ids = recent + new
    before, text = (decode(tokenizer, x[: len(x) - _num_incomplete(tokenizer, x)]) for x in (recent, ids))
    return text[len(before) :]


def _num_incomplete(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> int:
    """How many of the last tokens may be the beginning of a character."""
    for count in range(min(4, len(ids))):
        if not decode(tokenizer, ids[: len(ids) - count]).endswith("\ufffd"):
            return count
    # More than three bytes without a character are no beginning of one.
    return len(ids) if len(ids) < 4 else 0


def decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """The text of token ids, special tokens left out."""
    return str(tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))


def _reads_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    if len(tokenizer) != 256:
        return False
    return tokenizer.encode(_PROBE, add_special_tokens=False) == list(_PROBE.encode())
