"""What the pages of all inspections are made of: texts of tokens, coloured channels, lists, curves."""

from __future__ import annotations

import base64
import codecs
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from titans.data import is_byte_tokenizer
from titans.stream.text import NUM_RECENT, text_after

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 64
_PEAKS, _POINTS = 5, 400
# Entries of a list are at least so many stretches apart, so that one passage gives one entry.
_APART = 8
# Values above this quantile are drawn as if they were at it.
_CLIP = 0.995


def token_texts(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The characters of each token; a character of several bytes belongs to the last of them."""
    if is_byte_tokenizer(tokenizer):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [decoder.decode(bytes([token])) for token in ids.tolist()]
    texts, recent = [], ()
    for token in ids.tolist():
        texts.append(text_after(tokenizer, recent, (token,)))
        recent = (*recent, token)[-NUM_RECENT:]
    return texts


def packed(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(np.uint8).tobytes()).decode()


def channel(name: str, values: np.ndarray, unit: str, meaning: str, signed: bool = False) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    if signed:
        low, high = 0.0, float(np.quantile(np.abs(known), _CLIP)) or 1.0
        scaled = 128 + 127 * np.clip(values / high, -1, 1)
    else:
        low, high = float(np.median(known)), float(np.quantile(known, _CLIP))
        high = high if high > low else low + 1
        scaled = 255 * np.clip((values - low) / (high - low), 0, 1)
    scaled = np.where(np.isnan(values), 128.0 if signed else 0.0, scaled)
    return {
        "name": name, "unit": unit, "meaning": meaning, "signed": signed, "low": low, "high": high,
        "values": packed(np.rint(scaled)),
    }  # fmt: skip


def _windows(values: np.ndarray) -> np.ndarray:
    """Means of stretches of `WINDOW` tokens, the last one shorter."""
    filled = np.concatenate([values, np.full(-len(values) % WINDOW, np.nan)]).reshape(-1, WINDOW)
    known = ~np.isnan(filled)
    return np.where(known, filled, 0).sum(1) / np.maximum(known.sum(1), 1)


def peaks(
    title: str, meaning: str, channel_number: int, values: np.ndarray, texts: Sequence[str], unit: str
) -> dict[str, Any]:
    """The stretches with the highest means, at least `_APART` from each other."""
    means, chosen = _windows(values), []
    for window in np.argsort(-means, kind="stable").tolist():
        if len(chosen) < _PEAKS and all(abs(window - other) >= _APART for other in chosen):
            chosen.append(window)
    items = [
        (
            window * WINDOW,
            _excerpt(texts, window * WINDOW),
            f"{means[window]:.3g} {unit}, token {window * WINDOW:,}",
        )
        for window in chosen
    ]
    return {"title": title, "meaning": meaning, "channel": channel_number, "items": items}


def _excerpt(texts: Sequence[str], begin: int) -> str:
    """The stretch that begins at a token, widened to whole words where their ends are near."""

    def begins_word(i: int) -> bool:
        return i in (0, len(texts)) or texts[i - 1][-1:].isspace() or texts[i][:1].isspace()

    end, near = min(begin + WINDOW, len(texts)), WINDOW // 4
    first = next(filter(begins_word, range(begin, max(begin - near, 0) - 1, -1)), begin)
    last = next(filter(begins_word, range(end, min(end + near, len(texts)) + 1)), end)
    excerpt = " ".join("".join(texts[first:last]).split())
    return f"{'… ' if first else ''}{excerpt}{' …' if last < len(texts) else ''}" if excerpt else "(blank)"


def thinned(values: np.ndarray) -> list[float]:
    """Means of at most `_POINTS` stretches of equal length."""
    step = math.ceil(len(values) / _POINTS)
    return [float(f"{values[i : i + step].mean():.4g}") for i in range(0, len(values), step)]
