"""Does every variant learn? The tiny preset, 300 steps on the vendored text, three seeds, beside trigrams.

    python benchmarks/learning.py            # all runs, or those still missing; then the table
    python benchmarks/learning.py --seeds 0  # one seed

Runs are kept in runs/learning and are not repeated; an interrupted one starts again. The table goes to
benchmarks/results/learning.md and .json. Held-out text: one act of the play, kept away whole.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

from titans.baselines import InterpolatedNgram
from titans.data import hold_out, load_corpus
from titans.evaluate import bits_per_byte
from titans.hf import TitansForCausalLM
from titans.train import TrainingRun, TrainSettings
from titans.train.progress import ProgressLine

BATCH_SIZE = 8
VARIANTS = ("transformer", "mac", "mag", "mal", "lmm")
RESULTS = Path(__file__).parent / "results"


def run_one(variant: str, seed: int, steps: int, folder: Path) -> dict[str, float]:
    """Train one model and measure it; the measurements are kept in result.json."""
    kept = folder / "result.json"
    if kept.exists():
        return json.loads(kept.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    settings = TrainSettings(
        data="excerpt",
        output=folder,
        variant=variant,
        seed=seed,
        steps=steps,
        batch_size=BATCH_SIZE,
        eval_every=100,
        save_every=steps,
    )
    run = TrainingRun(settings)
    print(run.summary(), file=sys.stderr)
    with ProgressLine(steps, bytes_are_tokens=True) as progress:
        result = run.run(progress)
    model = TitansForCausalLM.from_pretrained(folder).eval()
    _, held_out = hold_out(load_corpus("excerpt"))
    documents = [(np.frombuffer(d.data, np.uint8), len(d.data)) for d in held_out]
    measured = {
        "loss": result.losses[-1][1],
        "windows": bits_per_byte(model, documents, context_length=settings.sequence_length).bits_per_byte,
        "stream": bits_per_byte(model, documents).bits_per_byte,
        "seconds": result.elapsed,
        "parameters": result.num_parameters,
    }
    if variant != "transformer":
        measured["frozen"] = bits_per_byte(
            model, documents, context_length=settings.sequence_length, freeze_memory=True
        ).bits_per_byte
    kept.write_text(json.dumps(measured))
    return measured


def table(found: dict[str, list[dict[str, float]]], trigram: float, steps: int) -> str:
    """The runs as a Markdown table."""

    def cell(runs: list[dict[str, float]], key: str) -> str:
        values = [run[key] for run in runs if key in run]
        if not values:
            return "–"
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    def change(runs: list[dict[str, float]]) -> str:
        changes = [f"{run['frozen'] - run['windows']:+.4f}" for run in runs if "frozen" in run]
        return ", ".join(changes) or "–"

    baseline = (
        statistics.mean(run["windows"] for run in found["transformer"]) if "transformer" in found else None
    )
    lines = [
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; "
        f"`python benchmarks/learning.py`; tiny preset, {steps} steps of {BATCH_SIZE} × 256 bytes of the "
        "vendored text, mean ± standard deviation over seeds. Held-out bits per byte of one act: in windows "
        "of 256 bytes, each with a fresh state; how the same changes with step size 0, for each seed; and "
        "the act in one stream.",
        "",
        f"Interpolated trigram byte model on the same text: **{trigram:.3f}**.",
        "",
        "| variant | parameters | seeds | held out | against transformer | with step size 0 | one stream |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, runs in found.items():
        against = "–"
        if baseline is not None and variant != "transformer":
            against = f"{100 * (statistics.mean(r['windows'] for r in runs) / baseline - 1):+.1f} %"
        lines.append(
            f"| {variant} | {runs[0]['parameters']:,} | {len(runs)} | {cell(runs, 'windows')} | {against} | "
            f"{change(runs)} | {cell(runs, 'stream')} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    arguments = parser.parse_args()
    train, held_out = hold_out(load_corpus("excerpt"))
    trigram = InterpolatedNgram(3, 256).fit([np.frombuffer(d.data, np.uint8) for d in train])
    floor = trigram.bits_per_token([np.frombuffer(d.data, np.uint8) for d in held_out])
    found: dict[str, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        for variant in arguments.variants:
            folder = arguments.runs / f"{variant}-{seed}-{arguments.steps}"
            found.setdefault(variant, []).append(run_one(variant, seed, arguments.steps, folder))
    text = table(found, floor, arguments.steps)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "learning.md").write_text(text)
    (RESULTS / "learning.json").write_text(json.dumps({"trigram": floor, "runs": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
