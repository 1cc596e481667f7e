"""The models that can be opened by name."""

from __future__ import annotations

from pathlib import Path

# The pretrained base that is fetched on first use, see `smollm.py`.
PRETRAINED = "smollm2-135m"
MODELS = Path(__file__).parent


def names() -> list[str]:
    """The models that come with the library."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def folder_in_library(name: str) -> Path | None:
    """Where a model that comes with the library lies; None for another name."""
    return MODELS / name if name in names() else None


def or_by_name() -> str:
    """The end of an error that asks for a model: the names in the library, if there are any."""
    return f", or one of {', '.join(names())}" if names() else ""
