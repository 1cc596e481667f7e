"""Does a price on writing make recall reach beyond the rows of training?

    python benchmarks/far_stage.py                 # what is missing, then the table
    python benchmarks/far_stage.py --worker 0/2    # every second arm, once the first stages are there

Dense and near stage of `titans.experiments.recall` once for each seed; then the far stage in 200 steps, with
and without a price on writing (`write_cost`). A number and a word told at the beginning are asked for at the
end, in a book that no model was trained on.
Finished arms are kept in benchmarks/results/far_stage.json.
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

RESULTS = Path(__file__).parent / "results"
STEPS, TEXTS = 200, 60
SEEDS = (0, 1)
PRICES = {"writing is free": 0.0, "writing costs": 0.03}
ASKED = {"number": (512, 2048, 8192, 32768), "word": (512, 2048, 8192)}


def measured(folder: Path, haystack: str) -> list[dict[str, float | str]]:
    model, tokenizer = zoo.load(str(folder))
    rows: list[dict[str, float | str]] = []
    for task, lengths in ASKED.items():
        for length in lengths:
            (cell,) = needle_table(
                model, tokenizer, task, [length], [0.0], haystack=haystack, samples=TEXTS, batch_size=20
            )
            rows.append({"task": task, **asdict(cell)})
    return rows


def report() -> None:
    with known(RESULTS / "far_stage.json") as found:
        found = dict(found)
    if not found:
        return
    about = next(iter(found.values()))
    columns = [(task, length) for task, lengths in ASKED.items() for length in lengths]
    lines = [
        f"{about['date']}, {about['machine']}; `python benchmarks/far_stage.py`. LMM, far stage of {STEPS} "
        f"steps; % recalled of {TEXTS} texts, told at the beginning, each seed; held-out bits per byte in "
        "windows of 2,048 that begin with an empty memory.",
        "",
        "| far stage | " + " | ".join(f"{task}, {length:,}" for task, length in columns) + " | text |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for arm in PRICES:
        kept = [found[key] for seed in SEEDS if (key := f"{arm}, seed {seed}") in found]
        if not kept:
            continue
        cells = []
        for task, length in columns:
            shares = [
                f"{100 * row['accuracy']:.0f}"
                for one in kept
                for row in one["rows"]
                if (row["task"], row["length"]) == (task, length)
            ]
            cells.append(", ".join(shares))
        bits = ", ".join(f"{one['bits_per_byte']:.3f}" for one in kept)
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {bits} |")
    (RESULTS / "far_stage.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/far-stage"), help="of the runs")
    parser.add_argument("--worker", default="0/1", help="which part of the arms, such as 0/2")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.worker.split("/"))
    torch.set_num_threads(1)
    haystack = "\n".join(d.data.decode("utf-8", "replace") for d in load_corpus("bible"))
    for seed in SEEDS:
        folder = arguments.output / str(seed)
        dense, near, far, _ = (
            replace(stage, seed=stage.seed + 10 * seed) for stage in stages("lmm", folder, threads=1)
        )
        for stage in (dense, near):
            run_stage(stage)
        for number, (arm, price) in enumerate(PRICES.items()):
            key = f"{arm}, seed {seed}"
            with known(RESULTS / "far_stage.json") as found:
                done = key in found
            if done or number % parts != part:
                continue
            output = folder / arm.replace(" ", "-")
            bits = run_stage(replace(far, output=output, steps=STEPS, write_cost=price))
            result = {
                "rows": measured(output, haystack),
                "bits_per_byte": bits,
                "date": str(datetime.date.today()),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
            }
            with known(RESULTS / "far_stage.json") as found:
                found[key] = result
            report()
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
