"""Does every variant learn? The tiny preset, 300 steps on the vendored text, three seeds, beside trigrams
and beside transformers of as many parameters.

    python benchmarks/learning.py            # all runs, or those still missing; then the table
    python benchmarks/learning.py --seeds 0  # one seed

Each finished run is kept in benchmarks/results/learning.json and not repeated; an interrupted one starts
again. Held-out text: one act of the play, kept away whole.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import known

from titans.baselines import InterpolatedNgram
from titans.data import hold_out, load_corpus
from titans.evaluate import bits_per_byte
from titans.hf import TitansForCausalLM
from titans.train import TrainingRun, TrainSettings
from titans.train.progress import ProgressLine

STEPS, BATCH_SIZE = 300, 8
# What is trained, and what of the preset is changed.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("transformer", {}),
    "transformer, 4 layers": ("transformer", {"num_hidden_layers": 4}),
    "transformer, 5 layers": ("transformer", {"num_hidden_layers": 5}),
    **{variant: (variant, {}) for variant in ("mac", "mag", "mal", "lmm")},
}
RESULTS = Path(__file__).parent / "results"
KEPT = RESULTS / "learning.json"


def run_one(arm: str, seed: int, folder: Path) -> None:
    """Train one model and measure it, unless that is known."""
    with known(KEPT) as found:
        if f"{arm}; seed {seed}" in found:
            return
    shutil.rmtree(folder, ignore_errors=True)
    variant, config = ARMS[arm]
    settings = TrainSettings(
        data="excerpt",
        output=folder,
        variant=variant,
        config=config,
        seed=seed,
        steps=STEPS,
        batch_size=BATCH_SIZE,
        eval_every=100,
        save_every=STEPS,
    )
    run = TrainingRun(settings)
    print(run.summary(), file=sys.stderr)
    with ProgressLine(STEPS, bytes_are_tokens=True) as progress:
        result = run.run(progress)
    model = TitansForCausalLM.from_pretrained(folder).eval()
    _, held_out = hold_out(load_corpus("excerpt"))
    documents = [(np.frombuffer(d.data, np.uint8), len(d.data)) for d in held_out]
    measured: dict[str, Any] = {
        "loss": result.losses[-1][1],
        "windows": bits_per_byte(model, documents, context_length=settings.sequence_length).bits_per_byte,
        "stream": bits_per_byte(model, documents).bits_per_byte,
        "seconds": result.elapsed,
        "parameters": result.num_parameters,
        "date": str(datetime.date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }
    if variant != "transformer":
        measured["frozen"] = bits_per_byte(
            model, documents, context_length=settings.sequence_length, freeze_memory=True
        ).bits_per_byte
    with known(KEPT) as found:
        found[f"{arm}; seed {seed}"] = measured


def table(found: dict[str, list[dict[str, Any]]], trigram: float) -> str:
    """The runs as a Markdown table."""

    def cell(runs: list[dict[str, Any]], key: str) -> str:
        values = [run[key] for run in runs]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    def held_out(arm: str) -> float:
        return statistics.mean(run["windows"] for run in found[arm])

    transformers = [arm for arm in found if ARMS[arm][0] == "transformer"]
    days = sorted({run["date"] for runs in found.values() for run in runs})
    machines = sorted({run["machine"] for runs in found.values() for run in runs})
    lines = [
        f"{' and '.join(days)}, {'; '.join(machines)}; `python benchmarks/learning.py`; tiny preset, {STEPS} "
        f"steps of {BATCH_SIZE} × 256 bytes of the vendored text, mean ± standard deviation over seeds. "
        "Held-out bits per byte of one act: in windows of 256 bytes, each with a fresh state; against the "
        "transformer whose parameters are nearest in number; how the same changes with step size 0, for each "
        "seed; and the act in one stream.",
        "",
        f"Interpolated trigram byte model on the same text: **{trigram:.3f}**.",
        "",
        "| variant | parameters | seeds | held out | against transformer | with step size 0 | one stream |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, runs in found.items():
        size, against, frozen = runs[0]["parameters"], "–", "–"
        if arm not in transformers:
            near = min(transformers, key=lambda other: abs(found[other][0]["parameters"] - size))
            against = (
                f"{100 * (held_out(arm) / held_out(near) - 1):+.1f} % ({found[near][0]['parameters']:,})"
            )
            frozen = ", ".join(f"{run['frozen'] - run['windows']:+.4f}" for run in runs)
        lines.append(
            f"| {arm} | {size:,} | {len(runs)} | {cell(runs, 'windows')} | {against} | {frozen} | "
            f"{cell(runs, 'stream')} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), help="folder of the runs")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for arm in arguments.arms:
            run_one(arm, seed, arguments.runs / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}")
    train, held_out = hold_out(load_corpus("excerpt"))
    trigram = InterpolatedNgram(3, 256).fit([np.frombuffer(d.data, np.uint8) for d in train])
    floor = trigram.bits_per_token([np.frombuffer(d.data, np.uint8) for d in held_out])
    with known(KEPT) as kept:
        of_arms = {arm: [value for key, value in kept.items() if key.split("; ")[0] == arm] for arm in ARMS}
    text = table({arm: runs for arm, runs in of_arms.items() if runs}, floor)
    print(text)
    (RESULTS / "learning.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
