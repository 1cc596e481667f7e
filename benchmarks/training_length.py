"""How far beyond its training length does a memory recall? The same tokens, in shorter and in longer rows.

    python benchmarks/training_length.py                 # what is missing, then the report
    python benchmarks/training_length.py --worker 0/2    # every second length

All models begin with the dense stage of `titans.experiments.recall`. Then each reads rows of its own length,
every one with a fresh memory, and facts asked for within the row. A number told at the beginning of a text is
asked for at its end, in texts of twice the length again and again, until it is no longer known. Finished
lengths are kept in benchmarks/results/training_length.json; table and picture go to docs/results.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from kept import known

from titans import zoo
from titans.data import load_corpus
from titans.evaluate.needle import needle_table
from titans.experiments.recall import run_stage, stages

RESULTS = Path(__file__).parent / "results" / "training_length.json"
REPORT = Path(__file__).parents[1] / "docs" / "results"
LENGTHS = (512, 1024, 2048, 4096)
TOKENS_PER_STEP, STEPS = 16384, 300
FIRST, LAST, TEXTS = 512, 131072, 60
# What counts as recalled, and where it is not worth reading on.
RECALLED, LOST = 0.9, 0.5


def trained(length: int, folder: Path) -> Path:
    """The folder of the model that has read rows of this length."""
    _, near, *_ = stages("lmm", folder, threads=1)
    row = replace(
        near,
        output=folder / f"rows-{length}",
        steps=STEPS,
        batch_size=TOKENS_PER_STEP // length,
        sequence_length=length,
        fact_distance=length,
        min_learning_rate=0.1,
    )
    run_stage(row)
    return row.output


def recalled(folder: Path, haystack: str) -> list[dict[str, float]]:
    model, tokenizer = zoo.load(str(folder))
    cells, length = [], FIRST
    while length <= LAST:
        (cell,) = needle_table(
            model, tokenizer, "number", [length], [0.0], haystack=haystack, samples=TEXTS, batch_size=20
        )
        cells.append(asdict(cell))
        print(f"{folder.name}: {length:,} bytes, {cell.accuracy:.0%}", file=sys.stderr)
        if cell.accuracy < LOST:
            break
        length *= 2
    return cells


def report() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with known(RESULTS) as found:
        found = dict(sorted(found.items(), key=lambda item: int(item[0])))
    if not found:
        return
    read = sorted({cell["length"] for row in found.values() for cell in row["cells"]})
    about = next(iter(found.values()))
    lines = [
        "# How long the rows of training are, and how far recall goes",
        "",
        f"`python benchmarks/training_length.py`, {about['date']}, {about['machine']}: LMM, {STEPS} steps "
        f"of {TOKENS_PER_STEP:,} bytes each, one seed; a number told at the beginning of a text, % recalled "
        f"with 95 % interval, {TEXTS} texts for each cell, longer ones while at least {LOST:.0%} are right.",
        "",
        "| bytes in a row | " + " | ".join(f"{n:,}" for n in read) + f" | longest with {RECALLED:.0%} |",
        "|---" * (len(read) + 2) + "|",
    ]
    figure, axis = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
    for trained_on, row in found.items():
        cells = {cell["length"]: cell for cell in row["cells"]}
        told = [
            f"{100 * c['accuracy']:.0f} ({100 * c['low']:.0f}–{100 * c['high']:.0f})"
            if (c := cells.get(n))
            else ""
            for n in read
        ]
        longest = max((n for n, c in cells.items() if c["accuracy"] >= RECALLED), default=0)
        far = f"{longest:,} ({longest / int(trained_on):g} ×)" if longest else "none"
        lines.append(f"| {int(trained_on):,} | " + " | ".join(told) + f" | {far} |")
        axis.plot(list(cells), [100 * c["accuracy"] for c in cells.values()], "o-", label=f"{trained_on}")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="bytes from the fact to the question", ylabel="% right", ylim=(-3, 103))
    axis.legend(title="bytes in a row", frameon=False, fontsize=8)
    REPORT.mkdir(parents=True, exist_ok=True)
    figure.savefig(REPORT / "training-length.png", dpi=130)
    plt.close(figure)
    lines += ["", "![Recall by distance, for each training length](training-length.png)"]
    (REPORT / "training-length.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/training-length"), help="folder of the runs"
    )
    parser.add_argument("--worker", default="0/1", help="which part of the lengths, such as 0/2")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.worker.split("/"))
    torch.set_num_threads(1)
    haystack = "\n".join(d.data.decode("utf-8", "replace") for d in load_corpus("bible"))
    for number, length in enumerate(LENGTHS):
        with known(RESULTS) as found:
            done = str(length) in found
        if done or number % parts != part:
            continue
        # A worker of its own first stage: they may run side by side.
        folder = arguments.output / str(length)
        run_stage(stages("lmm", folder, threads=1)[0])
        result = {
            "cells": recalled(trained(length, folder), haystack),
            "date": str(datetime.date.today()),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        }
        with known(RESULTS) as found:
            found[str(length)] = result
        report()
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
