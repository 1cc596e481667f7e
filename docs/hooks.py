"""What mkdocs.yml cannot express: pages from outside of docs/, links to them, folders in the navigation."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\[\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def brought() -> dict[str, str]:
    """The site's pages and pictures that stand outside of docs/, by their path in the repository."""
    pages = {f"examples/{file.name}": f"examples/{file.stem}.md" for file in ROOT.glob("examples/*.py")}
    for file in ROOT.glob("benchmarks/results/*.*"):
        if file.suffix in (".md", ".png"):
            pages[f"benchmarks/results/{file.name}"] = f"machine/{file.name}"
    for file in ROOT.glob("src/titans/zoo/**/README.md"):
        pages[str(file.relative_to(ROOT))] = f"models/{file.parent.name}.md"
    for name, page in (("CONTRIBUTING", "contributing"), ("SECURITY", "security"), ("CHANGELOG", "changes")):
        pages[f"{name}.md"] = f"contribute/{page}.md"
    return pages


BROUGHT = brought()
SOURCES = {page: source for source, page in BROUGHT.items()}


def example(path: Path) -> str:
    """A program as a page: its docstring as text, then the code."""
    tree, lines = ast.parse(path.read_text()), path.read_text().splitlines()
    code = "\n".join(lines[tree.body[0].end_lineno :]).strip()
    title = path.stem.replace("_", " ").capitalize()
    parts = (f"# {title}", f"`{path.relative_to(ROOT)}`", ast.get_docstring(tree), f"```python\n{code}\n```")
    return "\n\n".join(str(part) for part in parts) + "\n"


def on_config(config: MkDocsConfig) -> None:
    """Every `folder/*` of the navigation becomes that folder's pages, in the notebook the newest first."""

    named = set(re.findall(r"[\w/.-]+\.md", str(config.nav)))

    def expand(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {title: expand(inside) for title, inside in entry.items()}
        if isinstance(entry, list):
            return [page for each in entry for page in (folder(each) if is_folder(each) else [expand(each)])]
        return entry

    def is_folder(entry: Any) -> bool:
        return isinstance(entry, str) and entry.endswith("/*")

    def folder(entry: str) -> list[str]:
        name = entry.removesuffix("/*")
        stored = (str(f.relative_to(config.docs_dir)) for f in Path(config.docs_dir, name).glob("*.md"))
        pages = {*stored, *(p for p in SOURCES if p.startswith(f"{name}/") and p.endswith(".md"))}
        return sorted(pages - named, reverse=name == "notebook")

    config.nav = expand(config.nav)


def on_files(files: Files, config: MkDocsConfig) -> None:
    for source, page in BROUGHT.items():
        path = ROOT / source
        if path.suffix == ".py":
            files.append(File.generated(config, page, content=example(path)))
        else:
            files.append(File.generated(config, page, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links that lead from page to page of the repository lead from page to page of the site.

    What the site does not have, such as source code, is named without a link.
    """
    uri = page.file.src_uri
    here = os.path.dirname(SOURCES.get(uri, f"docs/{uri}"))

    def replace(match: re.Match[str]) -> str:
        text, path, anchor = match[1], match[2], match[3] or ""
        target = os.path.normpath(os.path.join(here, path))
        inside = target.startswith("docs/")
        if "://" in path or not (ROOT / target).exists() or (inside and uri not in SOURCES):
            return match[0]
        found = target.removeprefix("docs/") if inside else BROUGHT.get(target)
        if found is None:
            return text
        return f"[{text}]({os.path.relpath(found, os.path.dirname(uri) or '.')}{anchor})"

    return LINK.sub(replace, markdown)
