"""The examples of the guides run, with the output that they show, and links lead to files."""

from __future__ import annotations

import inspect
import io
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from unittest import mock

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import titans
from titans.baselines import BASELINES
from titans.data import byte_tokenizer
from titans.memory import OBJECTIVES, UPDATE_RULES
from titans.nn import BLOCKS, FEATURES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FENCED = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
NAMED = re.compile(r"\b(?:docs|examples|tests)/[\w/.-]+\.(?:md|py|png|json|html)\b")
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


# Pages whose blocks run here, and how many they have.
RUN = {
    "start/first-memory": 5,
    "start/first-training": 1,
    "guides/read": 8,
    "guides/library": 1,
    "guides/extend": 11,
    "guides/graft": 2,
    "reference/options": 2,
    "reference/hf": 1,
}
# tests/memory/test_family.py runs these.
FAMILY = {"how/family", "how/miras", "how/windows", "how/caching"}
# Lines of the library's source, and code that needs a server or another package.
QUOTED, FOREIGN = {"how/questions"}, {"guides/serve", "guides/from-titans-pytorch"}


def test_every_block_is_run_somewhere() -> None:
    pages = {
        str(page.relative_to(DOCS).with_suffix(""))
        for page in DOCS.rglob("*.md")
        if page.parent.name != "notebook" and BLOCK.search(page.read_text())
    }
    assert pages == set(RUN) | FAMILY | QUOTED | FOREIGN
    memory = ROOT / "src/titans/memory"
    source = (memory / "reference.py").read_text() + (memory / "rules/rule.py").read_text()
    quoted = [code for code, _ in BLOCK.findall((DOCS / "how/questions.md").read_text())]
    lines = {line.strip() for code in quoted for line in code.splitlines()}
    assert {line for line in lines if line not in source} == {"y, state = memory(x, state)"}
    for page in FOREIGN:
        for code, _ in BLOCK.findall((DOCS / f"{page}.md").read_text()):
            compile(code, page, "exec")


@pytest.mark.parametrize(("page", "blocks"), RUN.items())
def test_a_page_prints_what_it_shows(
    page: str, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = outputs(DOCS / f"{page}.md")
    assert len(found) == blocks
    for shown, printed in found:
        assert printed == shown


def test_the_guide_compares_two_rules_over_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last block of "Compare it", on runs that nobody has trained."""
    monkeypatch.chdir(tmp_path)
    for rule, found in {"momentum": (3.0, 3.1, 3.2), "pull_to_average": (2.9, 3.1, 3.0)}.items():
        for seed, last in enumerate(found):
            folder = Path("runs") / f"{rule}-{seed}"
            folder.mkdir(parents=True)
            lines = [{"kind": "eval", "bits_per_byte": 9}, {"kind": "eval", "bits_per_byte": last}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (code,) = re.findall(r"<<'END'\n(.*?)\nEND\n", (DOCS / "guides/extend.md").read_text(), re.DOTALL)
    exec(compile(code, "extend.md", "exec"), {})
    assert capsys.readouterr().out == (
        "momentum: 3.100 ± 0.248 pull_to_average: 3.000 ± 0.248\ndifference: -0.100 ± 0.248\n"
    )


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model in place of SmolLM2, whose answer tests/test_zoo.py looks at."""
    monkeypatch.chdir(tmp_path)
    sizes = dict(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    small = titans.graft(LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None)), window=64)
    monkeypatch.setattr(titans, "load", lambda name: (small, byte_tokenizer()))
    assert len(outputs(ROOT / "README.md")) == 3
    assert Path("stage.memory").exists()


def anchors(page: Path) -> set[str]:
    """The headings of a page as mkdocs and GitHub name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def is_there(page: Path, path: str, anchor: str) -> bool:
    target = page.parent / path if path else page
    return target.exists() and (not anchor or target.suffix != ".md" or anchor in anchors(target))


def test_every_link_and_every_named_page_is_there() -> None:
    pages = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "src").rglob("*.md")]
    missing = [
        f"{page.relative_to(ROOT)}: {path}#{anchor}"
        for page in pages
        for path, anchor in LINK.findall(FENCED.sub("`", page.read_text()))
        if "://" not in path and not is_there(page, path, anchor)
    ]
    for file in [*pages, *(ROOT / "src").rglob("*.py")]:
        named = set(NAMED.findall(file.read_text()))
        missing += [f"{file.relative_to(ROOT)}: {name}" for name in named if not (ROOT / name).exists()]
    assert not missing, "\n".join(sorted(missing))


def test_every_part_of_the_library_that_a_page_names_is_there() -> None:
    missing = []
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
        for name in set(re.findall(r"`(titans(?:\.[a-zA-Z_]\w*)+)", page.read_text())):
            try:
                resolve_name(name)
            except (ImportError, AttributeError):
                missing.append(f"{page.relative_to(ROOT)}: {name}")
    assert not missing, "\n".join(sorted(missing))


def test_every_page_is_in_the_navigation() -> None:
    named = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(DOCS) for page in DOCS.rglob("*.md")]
    lost = [str(page) for page in pages if f"- {page.parent}/*" not in named and f"- {page}" not in named]
    assert not lost, f"name these pages in mkdocs.yml, or move them to docs/guides: {lost}"


def words(page: Path) -> int:
    """Outside of code; pages of results are counted without their tables."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if page.parent.name != "results" or not line.startswith("|")]
    return sum(any(c.isalnum() for c in word) for line in lines for word in line.split())


def test_pages_are_short() -> None:
    pages = [page for page in DOCS.rglob("*.md") if page.parent.name != "notebook"]
    limits = {ROOT / "README.md": 800, **dict.fromkeys(pages, 1500)}
    long = {str(page): words(page) for page, limit in limits.items() if words(page) > limit}
    assert not long, f"longer than allowed, outside of code: {long}"


NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def test_the_summary_of_results_has_figures_of_the_pages() -> None:
    """Each line takes its figures from the pages it links to, so that a new measurement is not forgotten."""
    page = DOCS / "results/index.md"
    lines = [line for line in page.read_text().splitlines() if line.startswith("- ")]
    assert len(lines) == 5
    for line in lines:
        pages = [page.parent / path for path, _ in LINK.findall(line)]
        known = set(NUMBER.findall(" ".join(page.read_text() for page in pages)))
        lost = set(NUMBER.findall(LINK.sub("]", line))) - known
        assert not lost, f"{lost} not in the pages that this line links to: {line}"


GENERATED = [page for page in sorted(DOCS.glob("reference/*.md")) if "\n::: " in page.read_text()]


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: page.stem)
def test_the_reference_has_every_public_name(page: Path) -> None:
    """A page that names a module shows what is exported and has a docstring; all else is named on its own."""
    named = set(re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE))
    module = import_module("titans" if page.stem == "titans" else f"titans.{page.stem}")
    for name in set(module.__all__) - {"__version__"}:
        value = getattr(module, name)
        documented = inspect.isclass(value) or inspect.isfunction(value)
        assert not documented or value.__doc__, f"{name} has no docstring"
        whole = module.__name__ in named and documented
        assert whole or f"{module.__name__}.{name}" in named, f"{page.name} does not show {name}"


def test_every_file_names_the_version() -> None:
    version = titans.__version__
    for name, line in {
        "pyproject.toml": f'version = "{version}"',
        "CITATION.cff": f"version: {version}",
        "README.md": f"titans_ltm-{version}-py3",
        "docs/start/install.md": f"titans_ltm-{version}-py3",
    }.items():
        assert line in (ROOT / name).read_text(), f"{name} has another version than titans.__version__"
