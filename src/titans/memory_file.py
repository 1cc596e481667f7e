"""What a memory file says of itself, without torch: sizes, how much was read, and the norms of its layers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from titans.state_header import StateHeader, damaged_header, open_header


@dataclass(frozen=True)
class LayerStats:
    """Frobenius norms over all heads and matrices of one layer's memory, or of one memory of a graft.

    weight_norm, momentum_norm: of the fast weights and of their momentum. change: how far the network has
    moved from that of a fresh session, ‖W − W_0‖ / ‖W_0‖; None where the model is not at hand or W_0
    is 0.
    """

    weight_norm: float
    momentum_norm: float
    change: float | None


@dataclass(frozen=True)
class SessionStats:
    """tokens: taken in so far. state_bytes: held by all states. layers: one entry for each memory layer.

    mean_surprise: of all that was fed, over tokens, layers and heads; None where nothing is known of it.
    tokens_per_second: of what was fed in this process; None before.
    """

    tokens: int
    state_bytes: int
    layers: tuple[LayerStats, ...]
    mean_surprise: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class MemoryFile:
    """What a saved memory contains: the sizes it belongs to, the weights' fingerprint, its statistics.

    sentence: what its memory is, in a few words; None where the file does not say.
    """

    config: dict[str, Any]
    fingerprint: str | None
    stats: SessionStats
    sentence: str | None = None


def as_summary(stats: SessionStats, sentence: str | None) -> str:
    """What `read_summary` needs and only tensors have, as JSON for the header."""
    layers = [asdict(replace(layer, change=None)) for layer in stats.layers]
    return json.dumps({"state_bytes": stats.state_bytes, "layers": layers, "sentence": sentence})


def read_summary(path: str | Path) -> MemoryFile | None:
    """What a memory file contains, every byte of which is checked; None for a file without a summary.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        ValueError: if it is damaged.
    """
    with open_header(path) as header:
        config, num_columns = saved_model(header)
        tokens = num_columns + bool(recent_tokens(path, header.about, None))
        total, count = surprise_so_far(path, header.about)
        sentence = None
        if "model_type" in config:
            stats = SessionStats(tokens, sum(entry.nbytes for entry in header.entries.values()), ())
        elif not isinstance(config.get("variant"), str):
            raise damaged_header(path)
        elif "summary" in header.about:
            stats, sentence = _parsed(header, tokens)
        else:
            return None
        header.check()
        stats = replace(stats, mean_surprise=total / count if count else None)
        return MemoryFile(config, header.about.get("fingerprint"), stats, sentence)


def _parsed(header: StateHeader, tokens: int) -> tuple[SessionStats, str | None]:
    try:
        found = json.loads(header.about["summary"])
        layers = tuple(LayerStats(**layer) for layer in found["layers"])
        numbers = [found["state_bytes"], *(x for y in layers for x in (y.weight_norm, y.momentum_norm))]
        sentence = found["sentence"]
        if all(type(x) in (int, float) and 0 <= x < math.inf for x in numbers) and (
            sentence is None or isinstance(sentence, str)
        ):
            return SessionStats(tokens, int(found["state_bytes"]), layers), sentence
    except (KeyError, TypeError, ValueError, RecursionError):
        pass
    raise damaged_header(header.path)


def saved_model(file: StateHeader) -> tuple[dict[str, Any], int]:
    """The fields of the model that a file was written with, and how many columns it has read.

    Raises:
        ValueError: if the header does not say.
    """
    try:
        config, num_columns = json.loads(file.about["config"]), int(file.about["num_columns"])
        if isinstance(config, dict) and 0 <= num_columns < 2**53:
            return config, num_columns
    except (KeyError, TypeError, ValueError, RecursionError, OverflowError):
        pass
    raise damaged_header(file.path)


def recent_tokens(path: str | Path, about: dict[str, str], vocab_size: int | None) -> tuple[int, ...]:
    """The last tokens a session had taken in, from a file's header; ValueError where they are no ids."""
    try:
        recent = json.loads(about.get("recent_tokens", "[]"))
        if all(isinstance(t, int) and 0 <= t < (vocab_size or math.inf) for t in recent):
            return tuple(recent)
    except (ValueError, TypeError, RecursionError):
        pass
    raise ValueError(f"{path} has a damaged header: its recent_tokens are not ids of this model")


def surprise_so_far(path: str | Path, about: dict[str, str]) -> tuple[float, int]:
    """The sum of a session's surprise and of how many it is, from a file's header."""
    try:
        total, count = json.loads(about.get("surprise", "[0.0, 0]"))
        if isinstance(count, int) and count >= 0 and math.isfinite(float(total)):
            return float(total), count
    except (ValueError, TypeError, RecursionError, OverflowError):
        pass
    raise ValueError(f"{path} has a damaged header: its surprise must be [sum, count]")
