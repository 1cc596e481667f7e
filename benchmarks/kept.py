"""Results kept from run to run in a JSON file, to which several processes may add."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from titans.train.checkpoint import write_json

Found = dict[str, dict[str, Any]]


@contextmanager
def known(path: Path) -> Iterator[Found]:
    """The results so far; what is added within the block is kept."""
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found: Found = json.loads(path.read_text()) if path.exists() else {}
        before = len(found)
        yield found
        if len(found) > before:
            write_json(path, found)
