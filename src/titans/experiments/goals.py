"""The goals for grafts, recall, endless streams and language, with what the other experiments have found,
missed goals first. Measures nothing: it reads the results in its own folder.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from titans import zoo
from titans.evaluate.needle import wilson
from titans.experiments.endless import BACK, EARLY, MARKS, ROWS
from titans.experiments.goal import Goal
from titans.experiments.goals_of_grafts import graft_goals
from titans.experiments.needles import pooled, recalled, rows_of
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request
from titans.experiments.synthetic import PAPER, PAPER_TRANSFORMER
from titans.experiments.tables import markdown

# The last stages' rows.
TRAINED = 2048
MIB = 2**20
# Task, its usual name, and for each length how many % are to be right.
NEEDLES = (
    ("passkey", "passkey in filler (S-NIAH-PK)", {TRAINED: 99, 64 * TRAINED: 95, MIB: 90}),
    ("number", "number in a book (S-NIAH-N)", {TRAINED: 95, 16 * TRAINED: 90}),
    ("word", "word in a book (S-NIAH-W)", {TRAINED: 95, 4 * TRAINED: 90}),
    ("qa1", "who is where (bAbI-like qa1)", {MIB: 80}),
)
# What the same recipe makes of a variant without facts, by its label in language.json. Where it has read
# less, the label gives how much: a goal missed so is missed by even more.
PLAIN = {
    "titans-mag-tiny": "mag without facts",
    "titans-lmm-tiny": "lmm without facts, 11.5 million bytes",
    "titans-mac-tiny": "mac without facts",
    "lmm of commit ef35388, one core": "lmm without facts, 11.5 million bytes",
}
# Of fewer texts a share decides nothing.
FEWEST = 20


class Goals(Experiment):
    """No cells: a page of what the others have found."""

    name = "goals"
    title = "The goals, and what was reached"

    @property
    def command(self) -> str:
        """With the folder whose results it reads, because it measures nothing itself."""
        return f"{super().command} --output docs/results"

    def cells(self, request: Request) -> list[Cell]:
        return []

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        raise NotImplementedError("the goals are compared with the results of the other experiments")

    def table(self, results: Results) -> str:
        def cells(name: str) -> dict[str, Numbers]:
            return Results(results.path.with_name(f"{name}.json"), results.budget).cells

        goals = [
            *graft_goals(cells("graft-comparison"), cells("graft-training")),
            *needle_goals(Results(results.path.with_name("recall.json"), results.budget)),
            *endless_goals(cells("endless")),
            *language_goals(cells("language"), cells("learning")),
            *synthetic_goals(cells("synthetic")),
        ]
        parts = [
            "A recall goal of the small models is reached if the best of them reaches it; their tokens are "
            "bytes. % with 95 % interval, in italics where attention may reach some of the facts. A model of "
            "a commit: by the recipe of then. Each experiment's page has all its figures; attempts at the "
            "missed goals: [how a small model learns to recall](../how/recall.md).",
        ]
        if kept := cells("synthetic").get("fuzzy recall, transformer, seed 0"):
            parts.append(
                "MAD is another setup than the paper's, whose figures are only a threshold here: this "
                f"project's transformer has {100 * kept['accuracy']:.1f} % in fuzzy recall, the paper's "
                f"{PAPER_TRANSFORMER}. Reaching these goals does not compare architectures."
            )
        for title, reached in (("Missed", False), ("Not decided", None), ("Reached", True)):
            rows = [
                [g.what, g.wanted, g.figures or "–", f"[{g.experiment}]({g.experiment}.md)"]
                for g in goals
                if g.reached is reached
            ]
            if rows:
                parts += [f"## {title}", markdown(["goal", "wanted", "figures", "experiment"], rows)]
        return "\n\n".join(parts)


def needle_goals(results: Results) -> Iterator[Goal]:
    for task, name, wanted in NEEDLES:
        for length, percent in wanted.items():
            cells = {label: rows_of(results, label, task) for label in zoo.names()}
            lengths = {n for rows in cells.values() for n in rows if n <= length}
            at = max((n for n in lengths if best(cells, n) is not None), default=length)
            share = best(cells, at)
            # What is not recalled nearby is not looked for further on; what is, may be lost there.
            if at < length and share is not None and 100 * share >= percent:
                at, share = length, None
            already = f" at {at:,} already" if at < length else ""
            yield Goal(
                f"{name}, {length:,} bytes",
                f"≥ {percent} %",
                ", ".join(
                    f"{label} {recalled(rows[at])}{already}" for label, rows in cells.items() if at in rows
                ),
                100 * share >= percent if share is not None else None,
                "recall",
            )


def best(cells: dict[str, dict[int, list]], length: int) -> float | None:
    """The largest share recalled at a length, by a model asked often enough."""
    texts = [pooled(rows[length])[:2] for rows in cells.values() if length in rows]
    return max((correct / samples for correct, samples in texts if samples >= FEWEST), default=None)


def language_goals(language: dict[str, Numbers], learning: dict[str, Numbers]) -> Iterator[Goal]:
    for name, label in PLAIN.items():
        figures, reached = "", None
        if name in language and label in language:
            bits, plain = language[name]["plays"], language[label]["plays"]
            change = 100 * (bits / plain - 1)
            figures = f"{bits:.3f}, {plain:.3f} ({label}): {change:+.1f} %"
            reached = bits <= 1.02 * plain
        what = f"bits per byte of {name}, compared with the same recipe without facts"
        yield Goal(what, "within 2 %", figures, reached, "language")

    def mean(arm: str) -> float:
        values = [run["windows"] for name, run in learning.items() if name.split("; ")[0] == arm]
        return statistics.mean(values) if values else float("nan")

    for variant, layers in (("lmm", 4), ("mag", 5), ("mal", 5), ("mac", 5)):
        ours, theirs = mean(variant), mean(f"transformer, {layers} layers")
        known = ours == ours and theirs == theirs
        yield Goal(
            f"bits per byte of {variant}, compared with a transformer of as many parameters, 3 seeds",
            "better",
            f"{ours:.3f}, {theirs:.3f}: {100 * (ours / theirs - 1):+.1f} %" if known else "",
            ours < theirs if known else None,
            "learning",
        )


def endless_goals(found: dict[str, Numbers]) -> Iterator[Goal]:
    last = MARKS[-1]
    found = {name: cell for name, cell in found.items() if str(last) in cell["asked"] and name in zoo.names()}

    def goal(what: str, wanted: str, figures: list[str], reached: list[bool]) -> Goal:
        text = ", ".join(f"{name} {figure}" for name, figure in zip(found, figures, strict=True))
        return Goal(what, wanted, text, all(reached) if found else None, "endless")

    grown = [cell["rows"][-1][4] for cell in found.values()]
    yield goal(
        f"peak resident memory, {EARLY:,} to {last:,} tokens",
        "grows by less than 1 %",
        [f"{percent:+.1f} %" for percent in grown],
        [percent < 1 for percent in grown],
    )
    speeds = [[row[1] / row[2] for row in (cell["rows"][1], cell["rows"][-1])] for cell in found.values()]
    changed = [100 * (end / begin - 1) for begin, end in speeds]
    yield goal(
        "tokens a second in the last million, compared with the first",
        "within 10 %",
        [f"{change:+.0f} %" for change in changed],
        [abs(change) <= 10 for change in changed],
    )
    asked = [[cell["asked"][str(mark)] for mark in (EARLY, last)] for cell in found.values()]
    yield goal(
        f"bits per byte of a held-out play after {last:,} tokens, compared with {EARLY:,}",
        "within 2 %",
        [f"{early[0]:.3f} → {late[0]:.3f}" for early, late in asked],
        [late[0] <= 1.02 * early[0] for early, late in asked],
    )
    yield goal(
        f"numbers recalled at a distance of {BACK:,} bytes after {last:,} tokens, compared with {EARLY:,}, "
        f"of {ROWS}",
        f"as many, within the interval of those after {EARLY:,}",
        [f"{early[1]} → {late[1]}" for early, late in asked],
        [late[1] / ROWS >= wilson(early[1], ROWS)[0] for early, late in asked],
    )


def synthetic_goals(found: dict[str, Numbers]) -> Iterator[Goal]:
    for task, paper in PAPER.items():
        kept = found.get(f"{task}, lmm, seed 0")
        yield Goal(
            f"MAD, {task}",
            f"≥ {paper - 5:.1f} % (paper's Titans {paper:g})",
            f"lmm {100 * kept['accuracy']:.1f}" if kept else "",
            100 * kept["accuracy"] >= paper - 5 if kept else None,
            "synthetic",
        )
    for pairs in (256, 512, 1024):
        depths = [found.get(f"{pairs} pairs, depth {depth}, lmm, seed 0") for depth in (1, 2)]
        both = [100 * kept["accuracy"] for kept in depths if kept]
        yield Goal(
            f"{pairs} pairs (MQAR): depth 2 compared with depth 1 at equal state",
            "better",
            f"{both[1]:.1f}, {both[0]:.1f} %" if len(both) == 2 else "",
            both[1] > both[0] if len(both) == 2 else None,
            "synthetic",
        )
