"""The places a command will write to."""

from __future__ import annotations

from pathlib import Path

from titans.cli.errors import UsageError


def check_output(option: str, path: Path | None) -> None:
    """Find out before the work whether its result can be written.

    Raises:
        UsageError: if `path` is a folder or lies in none.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option}={str(path)!r} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise UsageError(f"{option}={str(path)!r}: there is no folder {str(path.parent)!r}; create it first")
