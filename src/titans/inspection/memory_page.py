"""The page of a Titans memory: surprise, gates, and gain in prediction over no memory and another text's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from titans.inspection.measure import Inspection
from titans.inspection.parts import WINDOW, channel, peaks, thinned


def memory_content(found: Inspection, texts: Sequence[str]) -> dict[str, Any]:
    """What the page shows next to its text, one of `texts` a token."""
    surprise = found.surprise.mean(-1)
    channels = [
        channel("surprise", surprise, "‖M(k) − v‖²", "Surprise: the error of the memories at each "
                 "token before it is written (M is a memory, k and v are the key and the value that its "
                 "layer computes from the token), mean over layers and heads. The step size (below) decides "
                 "how much of it is written. The scale begins at the median: half of the tokens are white."),
        channel("gain over no memory", found.helped, "nats", "Blue: with the memory of the text before it "
                 "the token was likelier than without a memory. Red: it was less likely.", signed=True),
        channel("gain over another text's", found.helped_over_another, "nats", "Blue: with the memory of "
                 "this text the token was likelier than with the memory of as much of another text.",
                 signed=True),
        channel("loss", found.loss, "nats", "The loss of each token. The scale begins at the median."),
    ]  # fmt: skip
    return {
        "numbers": _numbers(found),
        "numbers_meaning": "Mean loss in nats per token; less is better. In one stream all state is carried "
        f"along. In the other rows each passage of {found.passage_length:,} tokens begins with one memory "
        "and no other state: the memory of all text before it, of as much of another text, or none.",
        "how_to_read": f"Click a passage to go there; its figure is the mean over {WINDOW} tokens. Below "
        "are the coloured text and the gates of the memories.",
        "channels": channels,
        "lists": [
            peaks("Most surprising", "Surprise is high wherever a memory has read little.", 0,
                   surprise, texts, "surprise"),
            peaks("Where the memory helped most", "Compared with no memory.", 1, found.helped, texts,
                   "nats gained per token"),
            peaks("Where this text's memory helped most", "Compared with another text's memory.", 2,
                   found.helped_over_another, texts, "nats gained per token"),
        ],
        "charts": _charts(found),
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


def _charts(found: Inspection) -> list[dict[str, Any]]:
    layers, heads = found.step_size.shape[1:]

    def lines(values: np.ndarray) -> list[dict[str, Any]]:
        return [
            {"name": f"layer {layer}, head {head}", "values": thinned(values[:, layer, head])}
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
