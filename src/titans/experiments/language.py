"""How well do the models predict text, near the beginning of a long book and far into it?

Held-out plays, each read once in one stream, and the first million bytes of the Bible, of which no model has
read anything. A transformer, whose attention is no memory of constant size, reads windows of 4,096 bytes,
each from an empty state.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from titans.data import Document, hold_out, load_corpus
from titans.evaluate import bits_per_byte
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request
from titans.experiments.tables import markdown
from titans.experiments.trained import chosen_models, load, text_of

BOOK_BYTES, QUICK_BYTES, WINDOW = 2**20, 2**14, 4096


class Language(Experiment):
    """A cell for each model."""

    name = "language"
    title = "How well the models predict text"

    def cells(self, request: Request) -> list[Cell]:
        return [Cell(label, model) for label, model in chosen_models(request).items()]

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        model, _ = load(cell.settings, request.device)
        _, plays = hold_out(load_corpus("shakespeare"))
        most = QUICK_BYTES if request.quick else BOOK_BYTES
        if request.quick:
            plays = [Document(play.name, play.data[:most]) for play in plays]
        book = [Document("the Bible", text_of("bible")[:most])]
        found: Numbers = {
            "variant": model.config.variant,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        total = sum(len(document.data) for document in (*plays, *book))
        before = 0
        for name, documents in (("plays", plays), ("book", book)):
            read = bits_per_byte(
                model,
                [(np.frombuffer(d.data, np.uint8), len(d.data)) for d in documents],
                context_length=WINDOW if model.config.variant == "transformer" else None,
                progress=lambda done, _, start=before: progress(start + done, total),
            )
            before += sum(len(document.data) for document in documents)
            found[name] = read.bits_per_byte
        found["by_position"] = [[p.begin, p.bits_per_byte] for p in read.by_position]
        return found

    def table(self, results: Results) -> str:
        rows = dict(sorted(results.cells.items()))
        begins = sorted({begin for row in rows.values() for begin, _ in row["by_position"]})
        about = (
            f"Bits per byte of held-out plays, each in one stream, and of the first {BOOK_BYTES:,} bytes of "
            "the Bible in one stream: all of it, and from the position that heads a column to the next. No "
            "model was trained on either."
        )
        if any(row["variant"] == "transformer" for row in rows.values()):
            about += f" Full attention reads windows of {WINDOW:,} bytes, each from an empty state."
        lines = []
        for label, row in rows.items():
            bits = dict(map(tuple, row["by_position"]))
            cells = [f"{bits[n]:.3f}" if n in bits else "" for n in begins]
            lines.append(
                [label, f"{row['parameters']:,}", f"{row['plays']:.3f}", f"{row['book']:.3f}", *cells]
            )
        head = ["model", "parameters", "plays", "the Bible", *(f"{n:,}" for n in begins)]
        return f"{about}\n\n{markdown(head, lines)}"

    def draw(self, results: Results, folder: Path) -> dict[str, str]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axis = figure.subplots()
        for label, row in sorted(results.cells.items()):
            places, bits = zip(*row["by_position"], strict=True)
            axis.plot([str(n) for n in places], bits, "o-", label=label)
        axis.set(xlabel="bytes from the beginning of the Bible", ylabel="bits per byte")
        axis.legend(frameon=False, fontsize=8)
        figure.savefig(folder / f"{self.name}.png", dpi=130)
        return {f"{self.name}.png": "Bits per byte by position"}
