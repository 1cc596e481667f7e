"""The models that can be opened by name."""

from __future__ import annotations

from pathlib import Path

# The pretrained base that is fetched on first use, see `smollm.py`.
PRETRAINED = "smollm2-135m"
MODELS = Path(__file__).parent


def names() -> list[str]:
    """The Titans models that come with the library, complete."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def graft_names() -> list[str]:
    """The trained grafts that come with the library; their base is fetched on first use."""
    return sorted(path.parent.name for path in MODELS.glob("grafts/*/config.json"))


def folder_in_library(name: str) -> Path | None:
    """Where a model or graft that comes with the library lies; None for another name."""
    if name in graft_names():
        return MODELS / "grafts" / name
    return MODELS / name if name in names() else None


def or_by_name() -> str:
    """The end of an error that asks for a model: the names in the library, if there are any."""
    known = [*names(), *graft_names()]
    return f", or one of {', '.join(known)}" if known else ""
