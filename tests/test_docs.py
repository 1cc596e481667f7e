"""The pages whose examples are said to run do, with the output that they show."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


def outputs(page: Path) -> list[tuple[str, str]]:
    """What the page says that each of its blocks prints, and what it prints."""
    names: dict[str, object] = {}
    found = []
    for code, shown in BLOCK.findall(page.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), names)
        found.append((shown, printed.getvalue()))
    return found


def test_give_a_model_a_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = outputs(DOCS / "give-a-model-a-memory.md")
    assert len(found) == 7
    for shown, printed in found:
        assert printed == shown
