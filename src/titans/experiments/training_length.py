"""How far beyond its training length does a memory recall? The same tokens, in shorter and in longer rows.

All models begin with the dense stage of `titans.experiments.recipe`. Then each reads rows of its own length,
every one from an empty memory, and facts asked for within the row. A number stated at the beginning of a text
is asked for at its end, in texts of twice the length again and again, until it is no longer recalled.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from titans import zoo
from titans.evaluate.needle import needle_table
from titans.experiments.recipe import run_stage, stages
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request
from titans.experiments.tables import markdown, percent
from titans.experiments.trained import haystack

LENGTHS = (512, 1024, 2048, 4096)
TOKENS_PER_STEP, STEPS = 16384, 300
FIRST, LAST, TEXTS = 512, 131072, 60
# What counts as recalled, and below which longer texts are not read.
RECALLED, LOST = 0.9, 0.5


class TrainingLength(Experiment):
    """A cell for each length of the rows."""

    name = "training-length"
    title = "How long the rows of training are, and how far recall goes"

    def cells(self, request: Request) -> list[Cell]:
        return [Cell(str(length), length) for length in (LENGTHS[:1] if request.quick else LENGTHS)]

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        length, folder = cell.settings, request.work / "models" / cell.name
        # The dense stage is repeated for every length: processes may run side by side.
        dense, near, *_ = stages("lmm", folder, threads=1)
        rows = replace(
            near,
            output=folder / f"rows-{length}",
            steps=2 if request.quick else STEPS,
            batch_size=TOKENS_PER_STEP // length,
            sequence_length=length,
            facts=replace(near.facts, distance=length),
            min_learning_rate=0.1,
        )
        for stage in (replace(dense, steps=2) if request.quick else dense, rows):
            run_stage(stage)
        model, tokenizer = zoo.load(str(rows.output))
        found, asked = [], FIRST
        while asked <= LAST:
            (needle,) = needle_table(
                model,
                tokenizer,
                "number",
                [asked],
                [0.0],
                haystack=haystack(),
                samples=TEXTS,
                batch_size=20,
                progress=progress,
            )
            found.append([asked, needle.correct, needle.samples])
            if needle.accuracy < LOST:
                break
            asked *= 2
        return {"recalled": found}

    def table(self, results: Results) -> str:
        rows = {int(name): cell["recalled"] for name, cell in results.cells.items()}
        asked = sorted({n for cells in rows.values() for n, _, _ in cells})
        lines = []
        for length, cells in sorted(rows.items()):
            shares = {n: percent(right, texts) for n, right, texts in cells}
            longest = max((n for n, right, texts in cells if right >= RECALLED * texts), default=0)
            far = f"{longest:,} ({longest / length:g} ×)" if longest else "none"
            lines.append([f"{length:,}", *(shares.get(n, "") for n in asked), far])
        about = (
            f"LMM, {STEPS} steps of {TOKENS_PER_STEP:,} bytes each, one seed; a number stated at the "
            f"beginning of a text, % recalled with 95 % interval, {TEXTS} texts for each cell, longer ones "
            f"while at least {LOST:.0%} are right."
        )
        head = ["bytes in a row", *(f"{n:,}" for n in asked), f"longest with {RECALLED:.0%}"]
        return f"{about}\n\n{markdown(head, lines)}"

    def draw(self, results: Results, folder: Path) -> dict[str, str]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.4, 3.4), layout="constrained")
        axis = figure.subplots()
        for length, cell in sorted(results.cells.items(), key=lambda item: int(item[0])):
            places, right, texts = zip(*cell["recalled"], strict=True)
            axis.plot(places, [100 * r / n for r, n in zip(right, texts, strict=True)], "o-", label=length)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="bytes from the fact to the question", ylabel="% right", ylim=(-3, 103))
        axis.legend(title="bytes in a row", frameon=False, fontsize=8)
        figure.savefig(folder / f"{self.name}.png", dpi=130)
        return {f"{self.name}.png": "Recall by distance, for each training length"}
