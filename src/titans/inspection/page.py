"""One page in one file: the text coloured by what it did to the memory, and by what that did for it."""

from __future__ import annotations

import base64
import codecs
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titans.data import is_byte_tokenizer
from titans.inspection.measure import Inspection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WINDOW, _PEAKS, _POINTS = 64, 5, 400
# Stretches of a list are at least so many apart: one passage is one entry.
_APART = 8
# What is beyond is drawn as strongly as this quantile.
_CLIP = 0.995


def write_page(
    path: Path, found: Inspection, tokenizer: PreTrainedTokenizerBase, *, title: str, about: str
) -> None:
    """Write the page of an inspection; it needs no network and no other file.

    Args:
        title: what was read. about: one line: which model, what it is compared with.
    """
    texts = token_texts(found.ids, tokenizer)
    surprise = found.surprise.mean(-1)
    channels = [
        _channel("surprise", surprise, "‖M(k) − v‖²", "Surprise: how wrong the memories were about each "
                 "token before they learned it (M is a memory, k and v are the key and the value that its "
                 "layer makes of the token), mean over layers and heads. How much of it they write is up to "
                 "their step size (below). Half of the tokens surprise less than the scale begins with; they "
                 "are white."),
        _channel("helped, beside no memory", found.helped, "nats", "Blue: the memory of what was read before "
                 "made this token likelier than no memory did. Red: it made it less likely.", signed=True),
        _channel("helped, beside another text's", found.helped_beside_another, "nats", "Blue: the memory of "
                 "this text made the token likelier than the memory of another text of the same length did.",
                 signed=True),
        _channel("loss", found.loss, "nats", "How unlikely the model found each token. The likelier half is "
                 "white."),
    ]  # fmt: skip
    data = {
        "title": title,
        "about": about + ("; a token is a byte" if is_byte_tokenizer(tokenizer) else ""),
        "numbers": _numbers(found),
        "numbers_meaning": "Nats per token: how unlikely the model found the text; less is better. In one "
        "stream everything is carried on; for the others each passage of "
        f"{found.passage_length:,} tokens begins with the memory named and nothing else: that of all before "
        "it, that of as much of another text, or none.",
        "how_to_read": f"Click a passage to go there; its figure is the mean of {_WINDOW} tokens. The text "
        "follows, coloured, then what the memories did meanwhile.",
        "text": "".join(texts),
        # JavaScript counts in units of UTF-16.
        "lengths": _packed(np.array([len(text.encode("utf-16-le")) // 2 for text in texts], np.uint8)),
        "channels": channels,
        "lists": [
            _peaks("Most surprising", "A memory that has read little is surprised by everything.", 0,
                   surprise, texts, "surprise"),
            _peaks("Where the memory helped most", "Beside no memory.", 1, found.helped, texts,
                   "nats gained per token"),
            _peaks("Where this text's memory helped most", "Beside the memory of another text.", 2,
                   found.helped_beside_another, texts, "nats gained per token"),
        ],
        "charts": _charts(found),
    }  # fmt: skip
    # No "<" of the text may open or close anything.
    content = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = files("titans.inspection").joinpath("page.html").read_text(encoding="utf-8")
    path.write_text(template.replace("__DATA__", content), encoding="utf-8", errors="replace")


def token_texts(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token shows; of a character of several bytes the last one shows it."""
    if is_byte_tokenizer(tokenizer):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [decoder.decode(bytes([token])) for token in ids.tolist()]
    return [str(tokenizer.decode([token])) for token in ids.tolist()]


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(np.uint8).tobytes()).decode()


def _channel(name: str, values: np.ndarray, unit: str, meaning: str, signed: bool = False) -> dict[str, Any]:
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
        "values": _packed(np.rint(scaled)),
    }  # fmt: skip


def _numbers(found: Inspection) -> list[tuple[str, str]]:
    def mean(values: np.ndarray) -> float:
        return float(np.nanmean(values))

    return [
        ("tokens", f"{len(found.ids):,}"),
        ("nats per token, in one stream", f"{mean(found.loss):.3f}"),
        ("with this text's memory", f"{mean(found.own):.3f}"),
        ("with another text's memory", f"{mean(found.other):.3f}"),
        ("without a memory", f"{mean(found.none):.3f}"),
    ]


def _windows(values: np.ndarray) -> np.ndarray:
    """Means of stretches of `_WINDOW` tokens, the last one shorter."""
    filled = np.concatenate([values, np.full(-len(values) % _WINDOW, np.nan)]).reshape(-1, _WINDOW)
    known = ~np.isnan(filled)
    return np.where(known, filled, 0).sum(1) / np.maximum(known.sum(1), 1)


def _peaks(
    title: str, meaning: str, channel: int, values: np.ndarray, texts: Sequence[str], unit: str
) -> dict[str, Any]:
    """The stretches with the highest means, of each passage one."""
    means, chosen = _windows(values), []
    for window in np.argsort(-means, kind="stable").tolist():
        if len(chosen) < _PEAKS and all(abs(window - other) >= _APART for other in chosen):
            chosen.append(window)
    items = [
        (
            window * _WINDOW,
            _excerpt(texts, window * _WINDOW),
            f"{means[window]:.3g} {unit}, token {window * _WINDOW:,}",
        )
        for window in chosen
    ]
    return {"title": title, "meaning": meaning, "channel": channel, "items": items}


def _excerpt(texts: Sequence[str], begin: int) -> str:
    """The stretch that begins there, to the ends of the words it cuts, if these are near."""

    def begins_word(i: int) -> bool:
        return i in (0, len(texts)) or texts[i - 1][-1:].isspace() or texts[i][:1].isspace()

    end, near = min(begin + _WINDOW, len(texts)), _WINDOW // 4
    first = next(filter(begins_word, range(begin, max(begin - near, 0) - 1, -1)), begin)
    last = next(filter(begins_word, range(end, min(end + near, len(texts)) + 1)), end)
    told = " ".join("".join(texts[first:last]).split())
    return f"{'… ' if first else ''}{told}{' …' if last < len(texts) else ''}" if told else "(blank)"


def _thinned(values: np.ndarray) -> list[float]:
    """Means of at most `_POINTS` stretches of equal length."""
    step = math.ceil(len(values) / _POINTS)
    return [float(f"{values[i : i + step].mean():.4g}") for i in range(0, len(values), step)]


def _charts(found: Inspection) -> list[dict[str, Any]]:
    layers, heads = found.step_size.shape[1:]

    def lines(values: np.ndarray) -> list[dict[str, Any]]:
        return [
            {"name": f"layer {layer}, head {head}", "values": _thinned(values[:, layer, head])}
            for layer in range(layers)
            for head in range(heads)
        ]

    half_lives = math.log(2) / -np.log1p(-np.clip(found.forget.astype(np.float64), 1e-12, 1 - 1e-12))
    return [
        {"title": "How hard the memories write", "meaning": "The step size θ, mean over stretches, on a "
         "logarithmic scale: a peak is a token that is kept, at 0 nothing is.",
         "lines": lines(found.step_size), "logarithmic": True},
        {"title": "How slowly they forget", "meaning": "Tokens after which half is left, at the rate of each "
         "stretch; a logarithmic scale.", "lines": lines(half_lives), "logarithmic": True},
        {"title": "How much they hold", "meaning": "Norm of the fast weights: it rises while more is written "
         "than forgotten.",
         "lines": lines(found.memory_norm), "logarithmic": False},
    ]  # fmt: skip
