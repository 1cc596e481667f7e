"""How far does each model recall? Needles by length and depth, for models by name or in folders.

    python benchmarks/recall.py                               # what is missing, then the report
    python benchmarks/recall.py --lengths 512 2048            # these lengths alone
    python benchmarks/recall.py --models runs/transformer --label transformer
    python benchmarks/recall.py --device cuda                 # 200 texts for every length

Each cell is kept in benchmarks/results/recall.json and not repeated. The report and its pictures go to
docs/results. Haystack: the Bible, which no model that comes with the library was trained on.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from kept import Found, known

from titans import zoo
from titans.cli.progress import ReadingProgress
from titans.data import load_corpus
from titans.data.needles import TASKS
from titans.evaluate.heat_map import draw_heat_maps
from titans.evaluate.needle import NeedleCell, cells_of, needle_table, wilson

RESULTS = Path(__file__).parent / "results" / "recall.json"
REPORT = Path(__file__).parents[1] / "docs" / "results"
# Texts of each length, over all depths: 200, and fewer on a CPU where a text takes it minutes.
SAMPLES = {512: 200, 2048: 200, 8192: 200, 32768: 50, 131072: 20, 1048576: 20}
MOST_SAMPLES = 200
# Of the tasks below, those in the picture of all models.
DRAWN_TASKS = {
    "passkey": "passkey in filler (S-NIAH-PK)",
    "number": "number in a book (S-NIAH-N)",
    "word": "word in a book (S-NIAH-W)",
}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.9)
# Task of `titans.data.needles` and how many are told in the same words, of which one is asked for.
CHOSEN_TASKS = {
    "passkey": ("passkey", 1),
    "number": ("number", 1),
    "one of two numbers": ("number", 2),
    "one of four numbers": ("number", 4),
    "word": ("word", 1),
    "uuid": ("uuid", 1),
    "qa1": ("qa1", 1),
}


def measure(path: str, label: str, task: str, length: int, haystack: str, device: str) -> None:
    """All depths of one length, unless they are known."""
    key = f"{label}, {task}, {length}"
    with known(RESULTS) as found:
        if key in found:
            return
    model, tokenizer = zoo.load(path)
    model.to(device)
    kind, num_keys = CHOSEN_TASKS[task]
    num_cells = len(cells_of(TASKS[kind], [length], DEPTHS, num_keys, 1))
    samples = max((SAMPLES[length] if device == "cpu" else MOST_SAMPLES) // num_cells, 1)
    began = time.perf_counter()
    print(f"{label}: {task}, {length:,} tokens", file=sys.stderr)
    with ReadingProgress(samples * length * num_cells) as progress:
        cells = needle_table(
            model,
            tokenizer,
            kind,
            [length],
            DEPTHS,
            haystack=haystack,
            num_keys=num_keys,
            samples=samples,
            batch_size=min(samples, 20) if device == "cpu" else samples,
            progress=lambda done, total: progress.update(done, done, "reading"),
        )
    with known(RESULTS) as found:
        found[key] = {
            "cells": [asdict(cell) for cell in cells],
            "seconds": time.perf_counter() - began,
            "date": str(datetime.date.today()),
            "machine": f"{platform.machine() if device == 'cpu' else torch.cuda.get_device_name()}, "
            f"torch {torch.__version__}",
        }


def rows_of(found: Found, label: str, task: str) -> dict[int, list[NeedleCell]]:
    cells = {n: found[key]["cells"] for n in SAMPLES if (key := f"{label}, {task}, {n}") in found}
    return {length: [NeedleCell(**cell) for cell in row] for length, row in cells.items()}


def pooled(cells: list[NeedleCell]) -> tuple[int, int, bool]:
    """Right answers and texts over the depths that attention does not reach, or over all, and which it is."""
    beyond = [cell for cell in cells if cell.beyond_attention]
    chosen = beyond or cells
    return sum(c.correct for c in chosen), sum(c.samples for c in chosen), bool(beyond)


def told(cells: list[NeedleCell]) -> str:
    """Accuracy over the depths beyond attention, or in italics over all, where it may reach some."""
    if not cells:
        return ""
    correct, samples, beyond = pooled(cells)
    low, high = wilson(correct, samples)
    text = f"{100 * correct / samples:.0f} ({100 * low:.0f}–{100 * high:.0f})"
    return text if beyond else f"*{text}*"


def draw_by_length(found: Found, labels: list[str]) -> None:
    """Accuracy of each model over the length of what was read, a panel a task, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(DRAWN_TASKS), figsize=(11, 3.6), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (task, name) in zip(axes, DRAWN_TASKS.items(), strict=True):
        for label in labels:
            shares = {n: pooled(cells)[:2] for n, cells in rows_of(found, label, task).items()}
            if not shares:
                continue
            lengths = list(shares)
            percent = [100 * right / texts for right, texts in shares.values()]
            low, high = zip(*(wilson(right, texts) for right, texts in shares.values()), strict=True)
            (line,) = axis.plot(lengths, percent, "o-", alpha=0.8, label=label)
            axis.fill_between(
                lengths, [100 * p for p in low], [100 * p for p in high], color=line.get_color(), alpha=0.12
            )
        axis.set(title=name, xlabel="bytes read", xscale="log", ylim=(-3, 103))
        axis.set_xticks(list(SAMPLES), [f"{n:,}" for n in SAMPLES], rotation=30)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="% told back exactly")
    axes[-1].legend(frameon=False, fontsize=8)
    REPORT.mkdir(parents=True, exist_ok=True)
    figure.savefig(REPORT / "recall.png", dpi=130)
    plt.close(figure)


def _range(counts: list[int]) -> str:
    fewest, most = min(counts), max(counts)
    return str(most) if fewest == most else f"{fewest} to {most}"


def report() -> None:
    """Tables of what is known, a picture of all models, and one of each."""
    with known(RESULTS) as found:
        found = dict(found)
    labels = sorted({key.split(", ")[0] for key in found})
    totals: dict[int, list[int]] = {length: [] for length in SAMPLES}
    for cells in ([NeedleCell(**cell) for cell in one["cells"]] for one in found.values()):
        totals[cells[0].length].append(pooled(cells)[1])
    lines = [
        "# How far the models recall",
        "",
        "`python benchmarks/recall.py`: answers generated and exact, % with 95 % interval, needles at depths "
        f"{', '.join(f'{100 * depth:.0f}' for depth in DEPTHS)} %, "
        "several facts anywhere; only those that attention does not reach are counted (in italics: all, of "
        "which it may reach some). A token is a byte. Texts for each number: "
        + ", ".join(f"{_range(counts)} of {length:,}" for length, counts in totals.items() if counts)
        + ".",
        "",
        "![Told back, by bytes read](recall.png)",
    ]
    draw_by_length(found, labels)
    for task in CHOSEN_TASKS:
        tables = {label: rows_of(found, label, task) for label in labels}
        lengths = sorted({length for rows in tables.values() for length in rows})
        if not lengths:
            continue
        lines += [
            "",
            f"## {task}",
            "",
            "| tokens | " + " | ".join(labels) + " |",
            "|---" * (len(labels) + 1) + "|",
        ]
        for length in lengths:
            cells = [told(tables[label].get(length, [])) for label in labels]
            lines.append(f"| {length:,} | " + " | ".join(cells) + " |")
    for label in labels:
        tables = {task: rows_of(found, label, task) for task in CHOSEN_TASKS}
        maps = {
            task: [cell for row in rows.values() for cell in row] for task, rows in tables.items() if rows
        }
        if maps:
            picture = f"recall-{label.replace(' ', '-')}.png"
            draw_heat_maps(REPORT / picture, maps, label)
            lines += ["", f"![{label}]({picture})"]
    (REPORT / "recall.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=zoo.names(), help="names or folders")
    parser.add_argument("--label", help="what to call the one model given")
    parser.add_argument("--tasks", nargs="+", default=list(CHOSEN_TASKS), choices=list(CHOSEN_TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(SAMPLES), choices=list(SAMPLES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    haystack = "\n".join(d.data.decode("utf-8", "replace") for d in load_corpus("bible"))
    for length in sorted(arguments.lengths):
        for path in arguments.models:
            for task in arguments.tasks:
                measure(path, arguments.label or Path(path).name, task, length, haystack, arguments.device)
            report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
