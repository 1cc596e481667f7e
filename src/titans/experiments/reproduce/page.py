"""The page of all claims, drawn from the results of the tables."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from titans.experiments.reproduce.catalog import TABLES
from titans.experiments.reproduce.table import parts, verdict_table
from titans.experiments.results import Results
from titans.train.checkpoint import write_bytes

FILE = "claims.md"


def results_of(path: Path) -> Results:
    """Results of whichever budget the file has."""
    if not path.exists():
        return Results(path)
    return Results(path, json.loads(path.read_text(encoding="utf-8"))["budget"])


def write_claims(folder: Path) -> str:
    """Write and return the page of the results in a folder.

    Raises:
        OSError: if the page cannot be written.
    """
    page = claims_page(folder)
    write_bytes(folder / FILE, page.encode())
    return page


def claims_page(folder: Path) -> str:
    """The page of the results in a folder."""
    sections, count = [], Counter[str]()
    for name, table in TABLES.items():
        results = results_of(folder / f"{table.name}.json")
        verdicts = table.verdicts(results)
        count.update(verdict.word for verdict in verdicts)
        if results.cells:
            seeds = len({parts(cell)[2] for cell in results.cells})
            about = f"Budget {results.budget}, {seeds} seed{'s' * (seeds > 1)}, {results.about()}. "
            link = f"[The table]({table.name}.md)"
        else:
            about, link = "Not measured yet. ", "The table"
        sections.append(
            f"## {table.title}\n\n{about}{link} is drawn by `titans reproduce {name}`.\n\n"
            f"{verdict_table(verdicts)}"
        )
    counted = ", ".join(f"{number} {word}" for word, number in count.most_common())
    page = "\n\n".join(
        [
            "# What the paper claims, tested",
            f"Of {count.total()} claims: {counted}. Each claim compares two rows of a table of the paper. It "
            "is reproduced where the 95 % interval of the difference over at least three seeds lies on its "
            "side of 0; a quick run, fewer seeds, or two systems that have not learned the task decide "
            "nothing. `titans reproduce claims --output docs/results` draws this page from the JSON files "
            "next to it.",
            *sections,
        ]
    )
    return page + "\n"
