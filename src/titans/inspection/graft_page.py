"""The page of a graft: where its memory helped its base, token by token and by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from titans.inspection.grafted import GraftInspection, LossAt
from titans.inspection.parts import WINDOW, channel, peaks, thinned


def graft_content(found: GraftInspection, texts: Sequence[str]) -> dict[str, Any]:
    """What the page shows next to its text, one of `texts` a token."""
    of_each = []
    if found.association is not None:
        for name, gain in (
            ("association", found.base - found.association),
            ("adaptation", found.association - found.loss),
        ):
            meaning = f"The {name}'s part: the association's alone, or what the adaptation adds to it."
            of_each.append(channel(f"gain of the {name}", gain, "nats", meaning, signed=True))
    return {
        "numbers": [("tokens", f"{len(found.ids):,}"), _number("all", found.whole())]
        + [_number(place(part), part) for part in found.by_position()],
        "numbers_meaning": "Change of the mean loss by the memory, and the mean loss in nats per token "
        "without and with it; less is better. Both have the same base and the same window.",
        "how_to_read": f"Click a passage to go there; its figure is the mean over {WINDOW} tokens. Below "
        "are the coloured text and the losses by position.",
        "channels": [
            channel("gain", found.helped, "nats", "Blue: with the memory of the text before it the token was "
                    "likelier than without. Red: it was less likely.", signed=True),
            channel("loss with the memory", found.loss, "nats", "The scale begins at the median: half of the "
                    "tokens are white."),
            channel("loss without", found.base, "nats", "Of the base in the same window. The scale begins at "
                    "the median."),
            *of_each,
        ],
        "lists": [
            peaks("Where the memory helped most", "Compared with the base in the same window.", 0,
                  found.helped, texts, "nats gained per token"),
            peaks("Where it did harm", "Compared with the base in the same window.", 0, -found.helped,
                  texts, "nats lost per token"),
            peaks("Hardest to predict", "With the memory.", 1, found.loss, texts, "nats per token"),
        ],
        "charts": _charts(found),
    }  # fmt: skip


def place(part: LossAt) -> str:
    """Where a part of a text stands, in words."""
    if part.end is None:
        return f"tokens from {part.begin:,} on"
    return f"tokens {part.begin:,} to {part.end - 1:,}"


def percent(part: LossAt) -> str:
    """By how much the memory changes the loss, such as −1.2 %."""
    return f"{-100 * part.gain:+.1f} %".replace("-", "−")


def _number(name: str, part: LossAt) -> tuple[str, str]:
    return f"{name}: {part.base:.3f} → {part.loss:.3f}", percent(part)


def _charts(found: GraftInspection) -> list[dict[str, Any]]:
    def line(name: str, values: np.ndarray) -> dict[str, Any]:
        return {"name": name, "values": thinned(values[1:])}

    def saved(name: str, gain: np.ndarray) -> dict[str, Any]:
        return line(name, np.concatenate([[0.0], gain[1:].cumsum(dtype=np.float64)]))

    of_each = []
    if found.association is not None:
        of_each = [
            saved("by the association", found.base - found.association),
            saved("by the adaptation", found.association - found.loss),
        ]
    return [
        {"title": "Loss", "meaning": "Nats per token, mean over stretches; a logarithmic scale.",
         "lines": [line("with the memory", found.loss), line("without", found.base)], "logarithmic": True},
        {"title": "Nats saved so far", "meaning": "The sum of the gain of all tokens: it rises where the "
         "memory helps.", "lines": [saved("saved", found.helped), *of_each], "logarithmic": False},
    ]  # fmt: skip
