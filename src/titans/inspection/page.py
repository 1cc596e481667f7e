"""A self-contained HTML page: the text coloured by surprise and by what the memory gained in prediction."""

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
# Entries of a list are at least so many stretches apart, so that one passage gives one entry.
_APART = 8
# Values above this quantile are drawn as if they were at it.
_CLIP = 0.995


def write_page(
    path: Path, found: Inspection, tokenizer: PreTrainedTokenizerBase, *, title: str, about: str
) -> None:
    """Write the page of an inspection; it needs no network and no other file.

    Args:
        title: names the text. about: one line about the model and the text it is compared with.
    """
    texts = token_texts(found.ids, tokenizer)
    surprise = found.surprise.mean(-1)
    channels = [
        _channel("surprise", surprise, "‖M(k) − v‖²", "Surprise: the error of the memories at each "
                 "token before it is written (M is a memory, k and v are the key and the value that its "
                 "layer computes from the token), mean over layers and heads. The step size (below) decides "
                 "how much of it is written. The scale begins at the median: half of the tokens are white."),
        _channel("gain over no memory", found.helped, "nats", "Blue: with the memory of the text before it "
                 "the token was likelier than without a memory. Red: it was less likely.", signed=True),
        _channel("gain over another text's", found.helped_over_another, "nats", "Blue: with the memory of "
                 "this text the token was likelier than with the memory of as much of another text.",
                 signed=True),
        _channel("loss", found.loss, "nats", "The loss of each token. The scale begins at the median."),
    ]  # fmt: skip
    data = {
        "title": title,
        "about": about + ("; a token is a byte" if is_byte_tokenizer(tokenizer) else ""),
        "numbers": _numbers(found),
        "numbers_meaning": "Mean loss in nats per token; less is better. In one stream all state is carried "
        f"along. In the other rows each passage of {found.passage_length:,} tokens begins with one memory "
        "and no other state: the memory of all text before it, of as much of another text, or none.",
        "how_to_read": f"Click a passage to go there; its figure is the mean over {_WINDOW} tokens. Below "
        "are the coloured text and the gates of the memories.",
        "text": "".join(texts),
        # JavaScript counts in units of UTF-16.
        "lengths": _packed(np.array([len(text.encode("utf-16-le")) // 2 for text in texts], np.uint8)),
        "channels": channels,
        "lists": [
            _peaks("Most surprising", "Surprise is high wherever a memory has read little.", 0,
                   surprise, texts, "surprise"),
            _peaks("Where the memory helped most", "Compared with no memory.", 1, found.helped, texts,
                   "nats gained per token"),
            _peaks("Where this text's memory helped most", "Compared with another text's memory.", 2,
                   found.helped_over_another, texts, "nats gained per token"),
        ],
        "charts": _charts(found),
    }  # fmt: skip
    # No "<" of the text may open or close anything.
    content = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = files("titans.inspection").joinpath("page.html").read_text(encoding="utf-8")
    path.write_text(template.replace("__DATA__", content), encoding="utf-8", errors="replace")


def token_texts(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The characters of each token; a character of several bytes belongs to the last of them."""
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
    """The stretches with the highest means, at least `_APART` from each other."""
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
    """The stretch that begins at a token, widened to whole words where their ends are near."""

    def begins_word(i: int) -> bool:
        return i in (0, len(texts)) or texts[i - 1][-1:].isspace() or texts[i][:1].isspace()

    end, near = min(begin + _WINDOW, len(texts)), _WINDOW // 4
    first = next(filter(begins_word, range(begin, max(begin - near, 0) - 1, -1)), begin)
    last = next(filter(begins_word, range(end, min(end + near, len(texts)) + 1)), end)
    excerpt = " ".join("".join(texts[first:last]).split())
    return f"{'… ' if first else ''}{excerpt}{' …' if last < len(texts) else ''}" if excerpt else "(blank)"


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
        {"title": "Step size", "meaning": "θ, mean over stretches, on a logarithmic scale: tokens at a peak "
         "are written, tokens near 0 are not.",
         "lines": lines(found.step_size), "logarithmic": True},
        {"title": "Half-life", "meaning": "Tokens after which half of the fast weights is forgotten, at the "
         "rate of each stretch; a logarithmic scale.", "lines": lines(half_lives), "logarithmic": True},
        {"title": "Norm of the fast weights", "meaning": "It rises while more is written than forgotten.",
         "lines": lines(found.memory_norm), "logarithmic": False},
    ]  # fmt: skip
