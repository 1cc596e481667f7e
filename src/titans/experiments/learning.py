"""Does every variant learn? The tiny preset, 300 steps on the vendored text, compared with trigrams and with
transformers of as many parameters. Held-out text: one act of the play, kept out whole.
"""

from __future__ import annotations

import shutil
import statistics
from typing import Any

import numpy as np

from titans.baselines import held_out_bits
from titans.data import hold_out, load_corpus
from titans.evaluate import bits_per_byte
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request
from titans.experiments.tables import markdown
from titans.hf import TitansForCausalLM
from titans.train import TrainingRun, TrainSettings

STEPS, QUICK_STEPS, BATCH_SIZE, SEEDS = 300, 4, 8, 3
# What is trained, and what of the preset is changed.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("transformer", {}),
    "transformer, 4 layers": ("transformer", {"num_hidden_layers": 4}),
    "transformer, 5 layers": ("transformer", {"num_hidden_layers": 5}),
    **{variant: (variant, {"memory_depth": 2}) for variant in ("mac", "mag", "mal", "lmm")},
}


class Learning(Experiment):
    """A cell for each arm and seed."""

    name = "learning"
    title = "Whether every variant learns"

    def cells(self, request: Request) -> list[Cell]:
        seeds = request.seeds or (1 if request.quick else SEEDS)
        return [
            Cell(f"{arm}; seed {seed}", arm, seed, cost=1.0 if "transformer" in arm else 1.5)
            for seed in range(seeds)
            for arm in ARMS
        ]

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        variant, config = ARMS[cell.settings]
        folder = request.work / "models" / cell.name.replace("; ", "-").replace(", ", "-").replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        steps = QUICK_STEPS if request.quick else STEPS
        settings = TrainSettings(
            data="excerpt",
            output=folder,
            variant=variant,
            config=config,
            seed=cell.seed,
            steps=steps,
            batch_size=BATCH_SIZE,
            eval_every=steps,
            save_every=steps,
        )
        result = TrainingRun(settings).run(lambda line: progress(line["step"], steps))
        model = TitansForCausalLM.from_pretrained(folder).eval()
        _, held_out = hold_out(load_corpus("excerpt"))
        documents = [(np.frombuffer(d.data, np.uint8), len(d.data)) for d in held_out]
        windows = dict(context_length=settings.sequence_length)
        found: Numbers = {
            "windows": bits_per_byte(model, documents, **windows).bits_per_byte,
            "stream": bits_per_byte(model, documents).bits_per_byte,
            "parameters": result.num_parameters,
            "seconds": result.elapsed,
        }
        if variant != "transformer":
            frozen = bits_per_byte(model, documents, freeze_memory=True, **windows)
            found["frozen"] = frozen.bits_per_byte
        return found

    def table(self, results: Results) -> str:
        runs = {
            arm: [cell for name, cell in results.cells.items() if name.split("; ")[0] == arm] for arm in ARMS
        }
        runs = {arm: cells for arm, cells in runs.items() if cells}
        train, held_out = (
            [np.frombuffer(document.data, np.uint8) for document in documents]
            for documents in hold_out(load_corpus("excerpt"))
        )
        floors = ", ".join(f"{name} **{bits:.3f}**" for name, bits in held_out_bits(train, held_out).items())
        about = (
            f"Tiny preset, {STEPS} steps of {BATCH_SIZE} × 256 bytes of the vendored text, mean ± standard "
            "deviation over seeds. Held-out bits per byte of one act: in windows of 256 bytes, each from an "
            "empty state; compared with the transformer whose parameters are nearest in number; the change "
            "with step size 0, for each seed; and the act in one stream.\n\nBaselines that need no "
            f"gradient, on the same text: {floors}."
        )
        transformers = [arm for arm in runs if ARMS[arm][0] == "transformer"]
        rows = []
        for arm, cells in runs.items():
            size, against, frozen = cells[0]["parameters"], "–", "–"
            if arm not in transformers and transformers:
                near = min(transformers, key=lambda other: abs(runs[other][0]["parameters"] - size))
                change = 100 * (mean(cells, "windows") / mean(runs[near], "windows") - 1)
                against = f"{change:+.1f} % ({runs[near][0]['parameters']:,})"
                frozen = ", ".join(f"{cell['frozen'] - cell['windows']:+.4f}" for cell in cells)
            figures = [spread(cells, "windows"), against, frozen, spread(cells, "stream")]
            rows.append([arm, f"{size:,}", str(len(cells)), *figures])
        head = ["variant", "parameters", "seeds", "held out", "compared with transformer"]
        return f"{about}\n\n{markdown([*head, 'with step size 0', 'one stream'], rows)}"


def mean(cells: list[Numbers], key: str) -> float:
    return statistics.mean(cell[key] for cell in cells)


def spread(cells: list[Numbers], key: str) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(cell[key] for cell in cells):.3f}" if len(cells) > 1 else ""
    return f"{mean(cells, key):.3f}{deviation}"
