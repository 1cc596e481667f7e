"""How far does each model recall? Needles by context length and depth, in the Bible.

A full run with `--device cuda` reads 200 texts for every length; on a CPU, fewer where a text takes minutes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from titans.data.needles import TASKS
from titans.evaluate.heat_map import draw_heat_maps
from titans.evaluate.needle import NeedleCell, cells_of, needle_table, wilson
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request
from titans.experiments.tables import markdown, percent
from titans.experiments.trained import chosen_models, haystack, load

# Texts of each length on a CPU, over all depths.
SAMPLES = {512: 200, 2048: 200, 8192: 200, 32768: 50, 131072: 20, 1048576: 20}
MOST_SAMPLES = 200
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.9)
# Task of `titans.data.needles`, and how many facts are stated in the same words, of which one is asked for.
CHOSEN_TASKS = {
    "passkey": ("passkey", 1),
    "number": ("number", 1),
    "one of two numbers": ("number", 2),
    "one of four numbers": ("number", 4),
    "word": ("word", 1),
    "uuid": ("uuid", 1),
    "qa1": ("qa1", 1),
}
# Those in the picture of all models.
DRAWN_TASKS = {
    "passkey": "passkey in filler (S-NIAH-PK)",
    "number": "number in a book (S-NIAH-N)",
    "word": "word in a book (S-NIAH-W)",
}


class Question(NamedTuple):
    """What a cell asks: all depths of one length."""

    label: str
    model: str
    task: str
    length: int


class Needles(Experiment):
    """A cell for each model, task and length."""

    name = "recall"
    title = "How far the models recall"

    def cells(self, request: Request) -> list[Cell]:
        lengths, tasks = list(SAMPLES), list(CHOSEN_TASKS)
        if request.quick:
            lengths, tasks = lengths[:2], list(DRAWN_TASKS)
        return [
            Cell(
                f"{label}, {task}, {length}",
                Question(label, model, task, length),
                cost=length * (SAMPLES[length] if request.device == "cpu" else MOST_SAMPLES),
            )
            for length in lengths
            for label, model in chosen_models(request).items()
            for task in tasks
        ]

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        question: Question = cell.settings
        model, tokenizer = load(question.model, request.device)
        kind, num_keys = CHOSEN_TASKS[question.task]
        num_cells = len(cells_of(TASKS[kind], [question.length], DEPTHS, num_keys, 1))
        texts = SAMPLES[question.length] if request.device == "cpu" else MOST_SAMPLES
        samples = 2 if request.quick else max(texts // num_cells, 1)
        began = time.perf_counter()
        found = needle_table(
            model,
            tokenizer,
            kind,
            [question.length],
            DEPTHS,
            haystack=haystack(),
            num_keys=num_keys,
            samples=samples,
            batch_size=min(samples, 20) if request.device == "cpu" else samples,
            progress=progress,
        )
        return {
            "depths": [[c.depth, c.beyond_attention, c.correct, c.samples] for c in found],
            "seconds": time.perf_counter() - began,
        }

    def table(self, results: Results) -> str:
        labels = labels_of(results)
        texts: dict[int, list[int]] = {length: [] for length in SAMPLES}
        rows = []
        for task in CHOSEN_TASKS:
            of_task = {label: rows_of(results, label, task) for label in labels}
            for length in sorted({length for found in of_task.values() for length in found}):
                cells = [of_task[label].get(length, []) for label in labels]
                texts[length] += [pooled(cell)[1] for cell in cells if cell]
                rows.append([task, f"{length:,}", *map(recalled, cells)])
        about = (
            "Answers generated and exact, % with 95 % interval, needles at depths "
            f"{', '.join(f'{100 * depth:.0f}' for depth in DEPTHS)} %, several facts anywhere. Counted are "
            "only needles out of attention's reach; in italics: all of them, some within its reach. A token "
            "is a byte. Texts for each number: "
            + ", ".join(f"{_range(counts)} of {length:,}" for length, counts in texts.items() if counts)
            + "."
        )
        return f"{about}\n\n{markdown(['task', 'tokens', *labels], rows)}"

    def draw(self, results: Results, folder: Path) -> dict[str, str]:
        labels = labels_of(results)
        draw_by_length(results, labels, folder / f"{self.name}.png")
        drawn = {f"{self.name}.png": "Recall by context length"}
        for label in labels:
            tables = {task: rows_of(results, label, task) for task in CHOSEN_TASKS}
            maps = {task: [c for row in rows.values() for c in row] for task, rows in tables.items() if rows}
            if maps:
                file = f"{self.name}-{label.replace(' ', '-')}.png"
                draw_heat_maps(folder / file, maps, label)
                drawn[file] = label
        return drawn


def labels_of(results: Results) -> list[str]:
    return sorted({name.split(", ")[0] for name in results.cells})


def rows_of(results: Results, label: str, task: str) -> dict[int, list[NeedleCell]]:
    """The cells of a model and task by length."""
    found = {}
    for length in SAMPLES:
        kept = results.cells.get(f"{label}, {task}, {length}")
        if kept:
            found[length] = [
                NeedleCell(length, length, depth, beyond, right, texts, right / texts, *wilson(right, texts))
                for depth, beyond, right, texts in kept["depths"]
            ]
    return found


def pooled(cells: list[NeedleCell]) -> tuple[int, int, bool]:
    """Right answers and texts over the depths that attention does not reach, or over all, and which it is."""
    beyond = [cell for cell in cells if cell.beyond_attention]
    chosen = beyond or cells
    return sum(c.correct for c in chosen), sum(c.samples for c in chosen), bool(beyond)


def recalled(cells: list[NeedleCell]) -> str:
    """Accuracy over the depths beyond attention, or in italics over all, where it may reach some."""
    if not cells:
        return ""
    correct, samples, beyond = pooled(cells)
    text = percent(correct, samples)
    return text if beyond else f"*{text}*"


def draw_by_length(results: Results, labels: list[str], path: Path) -> None:
    """Accuracy of each model over the context length, a panel for each task, with 95 % intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, len(DRAWN_TASKS), sharex=True, sharey=True)
    for axis, (task, name) in zip(axes, DRAWN_TASKS.items(), strict=True):
        for label in labels:
            shares = {n: pooled(cells)[:2] for n, cells in rows_of(results, label, task).items()}
            if not shares:
                continue
            lengths = list(shares)
            accuracies = [100 * right / texts for right, texts in shares.values()]
            low, high = zip(*(wilson(right, texts) for right, texts in shares.values()), strict=True)
            (line,) = axis.plot(lengths, accuracies, "o-", alpha=0.8, label=label)
            axis.fill_between(
                lengths, [100 * p for p in low], [100 * p for p in high], color=line.get_color(), alpha=0.12
            )
        axis.set(title=name, xlabel="context length, bytes", xscale="log", ylim=(-3, 103))
        axis.set_xticks(list(SAMPLES), [f"{n:,}" for n in SAMPLES], rotation=30)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="% recalled exactly")
    axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _range(counts: list[int]) -> str:
    fewest, most = min(counts), max(counts)
    return str(most) if fewest == most else f"{fewest} to {most}"
