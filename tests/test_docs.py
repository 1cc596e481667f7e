"""The examples of the guides run, with the output that they show, and links lead to files."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

from titans.baselines import BASELINES
from titans.memory import OBJECTIVES, UPDATE_RULES
from titans.nn import BLOCKS, FEATURES

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
        with redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), names)
        found.append((shown, printed.getvalue()))
    return found


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a page registers is forgotten after it."""
    with ExitStack() as stack:
        for registry in (OBJECTIVES, UPDATE_RULES, FEATURES, BLOCKS, BASELINES):
            stack.enter_context(mock.patch.dict(registry))
        yield


@pytest.mark.parametrize(
    ("page", "blocks"),
    [("give-a-model-a-memory", 8), ("extend", 10), ("options", 2), ("graft", 1), ("family", 19)],
)
def test_a_page_prints_what_it_shows(
    page: str, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = outputs(DOCS / f"{page}.md")
    assert len(found) == blocks
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
