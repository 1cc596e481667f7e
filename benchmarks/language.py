"""How well do the models predict text, near the beginning of a long book and far into it?

    python benchmarks/language.py                                      # what is missing, then the report
    python benchmarks/language.py --models runs/plain/hold --label "mag without facts"

Held-out plays, each read once in one stream, and the first million bytes of the Bible, of which no model has
read anything. A transformer, whose attention is no memory of constant size, reads windows of 4,096 bytes,
each afresh. Each model is kept in benchmarks/results/language.json and not repeated; the report and its
picture go to docs/results.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import known

from titans import zoo
from titans.cli.progress import ReadingProgress
from titans.data import Document, hold_out, load_corpus
from titans.evaluate import bits_per_byte

RESULTS = Path(__file__).parent / "results" / "language.json"
REPORT = Path(__file__).parents[1] / "docs" / "results"
BOOK_BYTES, WINDOW = 2**20, 4096


def measure(path: str, label: str, texts: dict[str, Sequence[Document]]) -> None:
    with known(RESULTS) as found:
        if label in found:
            return
    model, _ = zoo.load(path)
    window = WINDOW if model.config.variant == "transformer" else None
    result: dict[str, Any] = {
        "variant": model.config.variant,
        "parameters": sum(p.numel() for p in model.parameters()),
        "date": str(datetime.date.today()),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }
    for name, documents in texts.items():
        pairs = [(np.frombuffer(d.data, np.uint8), len(d.data)) for d in documents]
        with ReadingProgress(sum(size for _, size in pairs)) as progress:
            read = bits_per_byte(
                model,
                pairs,
                context_length=window,
                progress=lambda done, _, name=name: progress.update(done, done, f"{label}: {name}"),
            )
        result[name] = {
            "bits": read.bits_per_byte,
            "by_position": [[p.begin, p.end, p.bits_per_byte] for p in read.by_position],
        }
    with known(RESULTS) as found:
        found[label] = result


def report() -> None:
    """A table and a picture of all models measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with known(RESULTS) as found:
        found = dict(sorted(found.items()))
    begins = sorted({begin for row in found.values() for begin, *_ in row["book"]["by_position"]})
    days = sorted({row["date"] for row in found.values()})
    machines = sorted({row["machine"] for row in found.values()})
    attends = any(row["variant"] == "transformer" for row in found.values())
    lines = [
        "# How well the models predict text",
        "",
        f"`python benchmarks/language.py`, {' and '.join(days)}, {'; '.join(machines)}: bits per byte of "
        f"held-out plays, each in one stream, and of the first {BOOK_BYTES:,} bytes of the Bible in one "
        "stream, all of it, and between the positions that head the columns; no model was trained on it."
        + (f" Full attention reads windows of {WINDOW:,} bytes, each afresh." if attends else ""),
        "",
        "| model | parameters | plays | the Bible | " + " | ".join(f"{n:,}" for n in begins) + " |",
        "|---" * (4 + len(begins)) + "|",
    ]
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for label, row in found.items():
        bits = {begin: value for begin, _, value in row["book"]["by_position"]}
        cells = [f"{bits[n]:.3f}" if n in bits else "" for n in begins]
        lines.append(
            f"| {label} | {row['parameters']:,} | {row['plays']['bits']:.3f} | {row['book']['bits']:.3f} | "
            + " | ".join(cells)
            + " |"
        )
        axis.plot([str(n) for n in bits], list(bits.values()), "o-", label=label)
    axis.set(xlabel="bytes from the beginning of the Bible", ylabel="bits per byte")
    axis.legend(frameon=False, fontsize=8)
    REPORT.mkdir(parents=True, exist_ok=True)
    figure.savefig(REPORT / "language.png", dpi=130)
    plt.close(figure)
    lines += ["", "![Bits per byte by position](language.png)"]
    (REPORT / "language.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=zoo.names(), help="names or folders")
    parser.add_argument("--label", help="what to call the one model given")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    _, plays = hold_out(load_corpus("shakespeare"))
    bible = b"\n".join(document.data for document in load_corpus("bible"))[:BOOK_BYTES]
    texts = {"plays": plays, "book": [Document("the Bible", bible)]}
    for path in arguments.models:
        measure(path, arguments.label or Path(path).name, texts)
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
