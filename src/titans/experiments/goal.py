"""A goal and whether it is reached."""

from __future__ import annotations

from typing import NamedTuple


class Goal(NamedTuple):
    """Reached is None where nothing was measured, or too little."""

    what: str
    wanted: str
    figures: str
    reached: bool | None
    experiment: str
