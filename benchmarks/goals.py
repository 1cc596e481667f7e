"""What was to be reached, and what was: the goals for recall, endless streams and language with the figures
of the other benchmarks' kept results, missed goals first.

    python benchmarks/goals.py

Measures nothing. The page goes to docs/results/README.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from endless import BACK, EARLY, MARKS, MILLION, ROWS, growth, speed
from kept import known
from recall import pooled, rows_of, told
from synthetic import PAPER

from titans import zoo
from titans.evaluate.needle import wilson

RESULTS = Path(__file__).parent / "results"
REPORT = Path(__file__).parents[1] / "docs" / "results" / "README.md"
# The last stages' rows.
TRAINED = 2048
MIB = 2**20
# Task, how it is called, and for each length how many % are to be right.
NEEDLES = (
    ("passkey", "passkey in filler (S-NIAH-PK)", {TRAINED: 99, 64 * TRAINED: 95, MIB: 90}),
    ("number", "number in a book (S-NIAH-N)", {TRAINED: 95, 16 * TRAINED: 90}),
    ("word", "word in a book (S-NIAH-W)", {TRAINED: 95, 4 * TRAINED: 90}),
    ("qa1", "who is where (bAbI-like qa1)", {MIB: 80}),
)
# What the same recipe makes of a variant without facts, by its label in language.json. Where it has read
# less, the label says how much: a goal missed so is missed all the more.
PLAIN = {
    "titans-mag-tiny": "mag without facts",
    "titans-lmm-tiny": "lmm without facts, 11.5 million bytes",
    "titans-mac-tiny": "mac without facts",
    "lmm of commit ef35388, one core": "lmm without facts, 11.5 million bytes",
}
# Of fewer texts a share says nothing about a goal.
FEWEST = 20


class Goal(NamedTuple):
    """Reached is None where nothing was measured, or too little."""

    what: str
    wanted: str
    figures: str
    reached: bool | None
    command: str


def load(name: str) -> dict[str, Any]:
    with known(RESULTS / f"{name}.json") as found:
        return dict(found)


def needle_goals() -> Iterator[Goal]:
    found = load("recall")
    for task, called, wanted in NEEDLES:
        for length, percent in wanted.items():
            cells = {name: rows_of(found, name, task) for name in zoo.names()}
            lengths = {n for rows in cells.values() for n in rows if n <= length}
            at = max((n for n in lengths if best(cells, n) is not None), default=length)
            share = best(cells, at)
            # What is not known nearby is not looked for far off; what is, may be lost there.
            if at < length and share is not None and 100 * share >= percent:
                at, share = length, None
            already = f" behind {at:,} already" if at < length else ""
            yield Goal(
                f"{called}, {length:,} bytes",
                f"≥ {percent} %",
                ", ".join(f"{name} {told(rows[at])}{already}" for name, rows in cells.items() if at in rows),
                100 * share >= percent if share is not None else None,
                "recall.py",
            )


def best(cells: dict[str, dict[int, Any]], length: int) -> float | None:
    """The largest share told at a length, by a model asked often enough."""
    texts = [pooled(rows[length])[:2] for rows in cells.values() if length in rows]
    return max((correct / samples for correct, samples in texts if samples >= FEWEST), default=None)


def language_goals() -> Iterator[Goal]:
    found = load("language")
    for name, label in PLAIN.items():
        figures, reached = "", None
        if name in found and label in found:
            bits, plain = found[name]["plays"]["bits"], found[label]["plays"]["bits"]
            figures, reached = (
                f"{bits:.3f} against {plain:.3f} ({label}): {100 * (bits / plain - 1):+.1f} %",
                bits <= 1.02 * plain,
            )
        yield Goal(
            f"bits per byte of {name} beside the same recipe without facts",
            "within 2 %",
            figures,
            reached,
            "language.py",
        )
    runs = load("learning")

    def mean(arm: str) -> float:
        values = [run["windows"] for key, run in runs.items() if key.split("; ")[0] == arm]
        return sum(values) / len(values)

    for variant, beside in (("lmm", 4), ("mag", 5), ("mal", 5), ("mac", 5)):
        ours, theirs = mean(variant), mean(f"transformer, {beside} layers")
        yield Goal(
            f"bits per byte of {variant} beside a transformer of as many parameters, 3 seeds",
            "better",
            f"{ours:.3f} against {theirs:.3f}: {100 * (ours / theirs - 1):+.1f} %",
            ours < theirs,
            "learning.py",
        )


def endless_goals() -> Iterator[Goal]:
    found = load("endless")
    last = MARKS[-1]
    names = [name for name in zoo.names() if f"{name}, asked, {last}" in found]

    def goal(what: str, wanted: str, figures: list[str], reached: list[bool]) -> Goal:
        told = ", ".join(f"{name} {figure}" for name, figure in zip(names, figures, strict=True))
        return Goal(what, wanted, told, all(reached) if names else None, "endless.py")

    ends = [found[f"{name}, read, {last}"] for name in names]
    grown = [growth(end) for end in ends]
    yield goal(
        f"peak resident memory, {EARLY:,} to {last:,} tokens",
        "grows by less than 1 %",
        [f"{percent:+.1f} %" for percent in grown],
        [percent < 1 for percent in grown],
    )
    first = [found[f"{name}, read, {MILLION}"] for name in names]
    changed = [100 * (speed(end) / speed(begin) - 1) for begin, end in zip(first, ends, strict=True)]
    yield goal(
        "tokens a second in the last million beside the first",
        "within 10 %",
        [f"{change:+.0f} %" for change in changed],
        [abs(change) <= 10 for change in changed],
    )
    asked = [[found[f"{name}, asked, {mark}"] for mark in (EARLY, last)] for name in names]
    bits = [[at["bits_per_byte"] for at in pair] for pair in asked]
    yield goal(
        f"bits per byte of a held-out play behind {last:,} tokens beside {EARLY:,}",
        "within 2 %",
        [f"{after:.3f} beside {before:.3f}" for before, after in bits],
        [after <= 1.02 * before for before, after in bits],
    )
    right = [[at["right"] for at in pair] for pair in asked]
    yield goal(
        f"numbers told {BACK:,} bytes before, behind {last:,} tokens beside {EARLY:,}, of {ROWS}",
        f"as many, within the interval of those behind {EARLY:,}",
        [f"{after} beside {before}" for before, after in right],
        [after / ROWS >= wilson(before, ROWS)[0] for before, after in right],
    )


def synthetic_goals() -> Iterator[Goal]:
    found = load("synthetic")
    for task, paper in PAPER.items():
        kept = found.get(f"{task}, lmm, seed 0")
        yield Goal(
            f"MAD, {task}",
            f"≥ {paper - 5:.1f} % (paper's Titans {paper:g})",
            f"lmm {100 * kept['accuracy']:.1f}" if kept else "",
            100 * kept["accuracy"] >= paper - 5 if kept else None,
            "synthetic.py --only mad",
        )
    for pairs in (256, 512, 1024):
        depths = [found.get(f"{pairs} pairs, depth {depth}, lmm, seed 0") for depth in (1, 2)]
        both = [100 * kept["accuracy"] for kept in depths if kept]
        yield Goal(
            f"{pairs} pairs (MQAR): depth 2 beside depth 1 at equal state",
            "better",
            f"{both[1]:.1f} against {both[0]:.1f} %" if len(both) == 2 else "",
            both[1] > both[0] if len(both) == 2 else None,
            "synthetic.py --only pairs",
        )


def main() -> int:
    goals = [*needle_goals(), *endless_goals(), *language_goals(), *synthetic_goals()]
    lines = [
        "# What was to be reached, and what was",
        "",
        "`python benchmarks/goals.py` makes this page of what the commands named have measured. A recall "
        "goal is reached if the best of the models reaches it. A token is a byte; % with 95 % interval, in "
        "italics where attention may reach some of the facts. Of a commit: by the recipe of then. "
        "What was tried for what was missed: [decisions/recall.md](../decisions/recall.md). All "
        "figures: [recall](recall.md), "
        "[ten million tokens](../../benchmarks/results/endless.md), [language](language.md), "
        "[what a memory keeps](memory.md), [training length](training-length.md), "
        "[learning](../../benchmarks/results/learning.md), "
        "[MAD and pairs](../../benchmarks/results/synthetic.md).",
    ]
    for title, reached in (("Missed", False), ("Not measured, or on too few texts", None), ("Reached", True)):
        rows = [goal for goal in goals if goal.reached is reached]
        if rows:
            lines += ["", f"## {title}", "", "| goal | wanted | figures | command |", "|---|---|---|---|"]
            lines += [
                f"| {g.what} | {g.wanted} | {g.figures or '–'} | `python benchmarks/{g.command}` |"
                for g in rows
            ]
    REPORT.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
