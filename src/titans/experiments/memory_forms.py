"""Which memory should be the default? Forms at equal state and at equal operations, on five tasks.

The rule that decides, and the order of the cells, were written before the first of them was measured:
docs/notebook/2026-11-30-memory-forms.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from titans.data.mad import TASKS as MAD
from titans.experiments import memory_tasks
from titans.experiments.memory_arms import ARMS
from titans.experiments.memory_tasks import (
    COSINES,
    CURRICULUM,
    PAIRS,
    RECALL_LENGTHS,
    RECALL_TASKS,
    TEXT_STEPS,
    WRITTEN_PAIRS,
)
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request
from titans.experiments.tables import interval, markdown

SEEDS = 3
# Approximate processor seconds of a cell.
COSTS = {"pairs": 35, "robustness": 1, "text": 20, "recall": 400, "mad": 60}


class Measured(NamedTuple):
    """What a cell measures. way: the variant of the task, such as a start or one of MAD's tasks."""

    task: str
    way: str
    size: str
    form: str

    @property
    def name(self) -> str:
        return ", ".join(part for part in self if part)


def planned() -> Iterator[list[Measured]]:
    """Groups in order of importance; all seeds of a group are measured before the next group."""
    most = [form for form in ARMS if form != "swiglu features"]
    yield [Measured("robustness", "", "4k", form) for form in ARMS]
    yield [Measured("pairs", "", "4k", form) for form in ARMS]
    yield [Measured("text", "sharp", "4k", form) for form in most]
    yield [Measured("recall", "", "4k", form) for form in most]
    # Sin features at 4k already have this number of operations.
    yield [Measured("pairs", "", "equal operations", form) for form in ARMS if form != "sin features"]
    yield [Measured("text", "induction", "4k", form) for form in most]
    yield [Measured("pairs", "", "1k", form) for form in ARMS]
    yield [Measured("mad", task, "4k", form) for task in MAD for form in most]
    # Added after the others, and of no weight in the rule: what a preset with unchanged heads loses.
    yield [Measured("pairs", "", "equal heads", "deep")]
    yield [Measured("text", start, "equal heads", "deep") for start in ("induction", "sharp")]


class MemoryForms(Experiment):
    """A cell for each form, size, task and seed."""

    name = "memory-forms"
    title = "Which memory should be the default"
    unit = 1.0

    def cells(self, request: Request) -> list[Cell]:
        seeds = request.seeds or (1 if request.quick else SEEDS)
        return [
            Cell(f"{m.name}, seed {seed}", m, seed, cost=COSTS[m.task])
            for group in planned()
            for seed in range(seeds)
            for m in group
        ]

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        """The numbers of a cell; `diverged` if a gradient was not finite."""
        measured: Measured = cell.settings
        arm, quick = ARMS[measured.form][measured.size], request.quick
        try:
            if measured.task == "pairs":
                return memory_tasks.pairs(arm, cell.seed, quick, progress)
            if measured.task == "robustness":
                return memory_tasks.robustness(arm, cell.seed, quick)
            if measured.task == "text":
                return memory_tasks.text(arm, measured.way, cell.seed, quick, progress)
            if measured.task == "mad":
                return memory_tasks.mad(arm, measured.way, cell.seed, quick, progress)
            folder = request.work / "models" / cell.name.replace(", ", "-").replace(" ", "-")
            return memory_tasks.recall(arm, cell.seed, quick, progress, folder)
        except (RuntimeError, ArithmeticError) as error:
            if "finite" not in str(error):
                raise
            return {"diverged": True}

    def table(self, results: Results) -> str:
        count = sum(len(group) for group in planned()) * SEEDS
        kept = len(results.cells)
        parts = [
            'LMM blocks, two heads, chunk 16, `form="stable"`; the state is 4,096 or 1,024 fast weights a '
            "head and as much momentum. Operations: multiply-adds a token and head by the formula of "
            "`titans.experiments.memory_arms`. deep: two layers and SiLU, the default of `NeuralMemory` "
            "until this was measured; linear: since then. At equal heads the deep memory is as wide as the "
            "linear one and has four times its state. Mean over seeds ± 95 % interval (Student's t). "
            + (f"{kept} of {count} cells are measured; – stands for the others." if kept < count else ""),
            "## Associative recall, % of queries\n\nOne layer of width 64, trained with "
            + ", ".join(f"{n} pairs for {steps} steps" for n, steps in CURRICULUM.items())
            + " of 4,096 tokens, one after the other, and then tested with all of them; 512 keys, 64 "
            'values; `start="sharp"`.',
            table_of(results, "pairs", [Column(str(n), key=str(n)) for n in PAIRS], sizes=True),
            "## Inexact queries, % of reads\n\nPairs written once into an untrained memory, at the best step "
            "size of six, and read with queries of this cosine with their keys.",
            table_of(
                results,
                "robustness",
                [Column(f"{n} pairs, {c}", key=f"{n} at {c}") for n in WRITTEN_PAIRS for c in COSINES],
            ),
            f"## Text, held-out bits per byte\n\nOne layer of width 64, {TEXT_STEPS} steps of 4,096 bytes, "
            "the width of the MLP chosen so that all models have as many parameters; windows of 256 bytes, "
            "and one stream of 16 KiB.",
            table_of(
                results,
                "text",
                [
                    Column(f"{what}, {start}", start, key, 1, 3)
                    for start in ("sharp", "induction")
                    for what, key in (("windows", "windows"), ("one stream", "stream"))
                ],
                sizes=True,
            ),
            '## Needles in a book, % exact\n\nTwo layers of width 128, `form="recall"`, the first two stages '
            "of the recipe, shortened to 120 and 80 steps.",
            table_of(
                results,
                "recall",
                [
                    Column(f"{task} {length:,}", key=f"{task} {length}", digits=0)
                    for task in RECALL_TASKS
                    for length in RECALL_LENGTHS
                ],
            ),
            "## MAD, % of labels\n\nTwo layers of width 128, 200 steps of 32 rows.",
            table_of(results, "mad", [Column(task, task, "right") for task in MAD]),
        ]
        return "\n\n".join(parts)


class Column(NamedTuple):
    """A column of a table: its title, and which number of which cells it shows."""

    title: str
    way: str = ""
    key: str = ""
    scale: float = 100
    digits: int = 1


def table_of(results: Results, task: str, columns: list[Column], sizes: bool = False) -> str:
    """A row for each form and size."""
    places = dict.fromkeys((m.form, m.size) for group in planned() for m in group if m.task == task)
    rows = []
    for form, size in places:
        arm, shown, seeds, diverged = ARMS[form][size], [], 0, 0
        for column in columns:
            name = Measured(task, column.way, size, form).name
            cells = [cell for key, cell in results.cells.items() if key.rpartition(", seed")[0] == name]
            good = [cell for cell in cells if "diverged" not in cell]
            seeds, diverged = max(seeds, len(good)), max(diverged, len(cells) - len(good))
            # A cell of a quick run has fewer numbers.
            values = [column.scale * share(cell[column.key]) for cell in good if column.key in cell]
            shown.append(interval(values, column.digits))
        count = f"{seeds} ({diverged} diverged)" if diverged else str(seeds)
        rows.append(
            [form, *([size, f"{arm.numbers:,}"] if sizes else []), f"{arm.operations:,}", count, *shown]
        )
    head = ["form", *(["size", "fast weights"] if sizes else []), "operations", "seeds"]
    return markdown([*head, *(column.title for column in columns)], rows)


def share(value: float | list[int]) -> float:
    """The value itself, or [right, asked] as a share."""
    return value[0] / value[1] if isinstance(value, list) else value
