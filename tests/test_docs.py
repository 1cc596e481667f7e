"""The examples of the guides run, with the output that they show, and links lead to files."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)#\s]+)")
NAMED = re.compile(r"\b(?:docs|examples)/[\w/.-]+\.(?:md|py|png|json|html)\b")
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


def outputs(page: Path) -> list[tuple[str, str]]:
    """What the page shows as the output of each of its blocks, and what the block prints."""
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


def test_every_link_and_every_named_page_is_there() -> None:
    pages = [ROOT / "README.md", *DOCS.rglob("*.md"), *(ROOT / "src").rglob("*.md")]
    missing = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in LINK.findall(page.read_text())
        if "://" not in link and not (page.parent / link).exists()
    ]
    for file in [*pages, *(ROOT / "src").rglob("*.py")]:
        named = set(NAMED.findall(file.read_text()))
        missing += [f"{file.relative_to(ROOT)}: {name}" for name in named if not (ROOT / name).exists()]
    assert not missing, "\n".join(sorted(missing))
