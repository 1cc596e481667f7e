"""The page of all claims, drawn from the results of the tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from titans.experiments.reproduce.catalog import TABLES
from titans.experiments.reproduce.claims import FEWEST_SEEDS, Verdict
from titans.experiments.reproduce.table import PaperTable, parts, verdict_table
from titans.experiments.results import Results
from titans.experiments.runner import Request, write_page
from titans.experiments.tables import markdown
from titans.train.checkpoint import write_bytes

FILE = "claims.md"
# The patterns of one claim's systems, of the table of this name.
EXAMPLE, SYSTEMS_OF_ONE = "language", ("lmm, *", "gated-deltanet, *")
VERDICTS = {
    "reproduced": f"The difference over at least {FEWEST_SEEDS} seeds, paired by seed, has a 95 % interval "
    "(Student's t) on the side of 0 that the claim states.",
    "not reproduced": "The interval is on the other side of 0.",
    "not decided": "The interval holds 0; or there are fewer seeds, or only a quick run, whose models are "
    "too small and trained too short to compare; or neither system has learned the task.",
    "not testable here": "Data, weights or kernels cannot be had here; the reason is given.",
}


def results_of(path: Path) -> Results:
    """Results of whichever budget the file has."""
    if not path.exists():
        return Results(path)
    return Results(path, json.loads(path.read_text(encoding="utf-8"))["budget"])


def write_claims(folder: Path) -> str:
    """Write and return the page of the results in a folder; the pages of its tables are drawn anew.

    Raises:
        OSError: if a page cannot be written.
    """
    for table in TABLES.values():
        if (results := results_of(folder / f"{table.name}.json")).cells:
            write_page(table, results)
    page = claims_page(folder)
    write_bytes(folder / FILE, page.encode())
    return page


def claims_page(folder: Path) -> str:
    """The page of the results in a folder."""
    sections, rows, count = [], [], Counter[str]()
    for name, table in TABLES.items():
        results = results_of(folder / f"{table.name}.json")
        verdicts = table.verdicts(results)
        count.update(verdict.word for verdict in verdicts)
        rows.append(_row(name, table, verdicts))
        about = " ".join(_about(name, table, results, folder))
        sections.append(f"## {table.title}\n\n{about}\n\n{verdict_table(verdicts)}")
    counted = ", ".join(f"{number} {word}" for word, number in count.most_common())
    only = " ".join(f"'{pattern}'" for pattern in SYSTEMS_OF_ONE)
    minutes = TABLES[EXAMPLE].minutes(Request("medium"), SYSTEMS_OF_ONE)
    total = [f"**{sum(row[column] for row in rows):.0f}**" for column in range(1, 6)]
    head = [
        "table",
        "claims",
        "testable here",
        "decided",
        "hours, `--budget medium`",
        "hours, `--budget full`",
    ]
    shown = [[row[0], *(f"{n}" for n in row[1:4]), *(f"{hours:.1f}" for hours in row[4:])] for row in rows]
    page = "\n\n".join(
        [
            "# What the paper claims, tested",
            f"Of {count.total()} claims: {counted}. Each claim compares two rows of a table of the paper.",
            markdown(["verdict", "when"], VERDICTS.items()),
            "`titans reproduce TABLE` measures a table. Hours are those of one processor by its plan "
            "(`--plan`), which begins with what decides the most claims.",
            markdown(head, [*shown, ["**all**", *total]]),
            f"One claim alone takes two systems, here Titans (LMM) and Gated DeltaNet in about {minutes:.0f} "
            f"processor minutes: `titans reproduce {EXAMPLE} --budget medium --only {only}`. "
            "`titans reproduce claims --output docs/results` draws this page from the JSON files next to it.",
            *sections,
        ]
    )
    return page + "\n"


def _row(
    name: str, table: PaperTable, verdicts: Sequence[Verdict]
) -> tuple[str, int, int, int, float, float]:
    """Its link, claims, those testable here and those decided, and hours of both budgets."""
    testable = [verdict for verdict in verdicts if verdict.word != "not testable here"]
    hours = [table.minutes(Request(budget)) / 60 * bool(testable) for budget in ("medium", "full")]
    decided = sum(verdict.word != "not decided" for verdict in testable)
    return f"`{name}`", len(verdicts), len(testable), decided, hours[0], hours[1]


def _about(name: str, table: PaperTable, results: Results, folder: Path) -> list[str]:
    """How a table was measured, what it takes for learned, and which other pages are about its claims."""
    claims = [claim for claim in table.claims() if not claim.unavailable]
    if results.cells:
        seeds = len({parts(cell)[2] for cell in results.cells})
        found = [
            f"Budget {results.budget}, {seeds} seed{'s' * (seeds > 1)}, {results.about()}.",
            f"[The table]({table.name}.md) is drawn by `titans reproduce {name}`.",
        ]
    elif claims:
        found = [f"Not measured yet. The table is drawn by `titans reproduce {name}`."]
    else:
        found = [f"Nothing testable here; `titans reproduce {name}` says what would be needed."]
    floors = {claim.floor: claim.key for claim in claims if claim.floor is not None}
    if floors:
        each = " and ".join(f"{floor:g} %{f' ({key})' * (len(floors) > 1)}" for floor, key in floors.items())
        found.append(f"Neither system has learned the task where neither exceeds {each}.")
    if pages := [page for page in table.elsewhere if (folder / f"{page}.md").exists()]:
        links = " and ".join(f"[{page}]({page}.md)" for page in pages)
        found.append(f"By other recipes, which decide no claim: {links}.")
    return found
