"""Tables and pictures of what `memory_questions.py` has found, for docs/results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kept import known

RESULTS = Path(__file__).parent / "results" / "memory_questions.json"
REPORT = Path(__file__).parents[1] / "docs" / "results"
Row = dict[str, Any]


def table(title: str, cell: dict[tuple[str, int], Row], arms: list[str], places: list[int]) -> list[str]:
    """Arms side by side, or below each other where they are many."""

    def told(arm: str, x: int) -> str:
        r = cell[arm, x]
        surprise = f", surprise {r['surprise']:.2f}" if "surprise" in r else ""
        return f"{100 * r['share']:.0f} ({100 * r['low']:.0f}–{100 * r['high']:.0f}){surprise}"

    if len(arms) <= 2 * len(places):
        head, rows = arms, [[f"{x:,}", *(told(arm, x) for arm in arms)] for x in places]
    else:
        head, rows = [f"{x:,}" for x in places], [[arm, *(told(arm, x) for x in places)] for arm in arms]
    lines = [[title, *head], ["---"] * (len(head) + 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def report(questions: Mapping[str, tuple[str, str]], texts: int) -> None:
    """Tables and pictures of what is known.

    Args:
        questions: what the places of each are, such as "bytes after the fact", and what it asks. texts: for
            each point.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with known(RESULTS) as found:
        found = dict(found)
    lines = [
        "# What a memory keeps",
        "",
        f"`python benchmarks/memory_questions.py`: a seven-digit number is told, and asked for at the end; "
        f"{texts} texts for each point, answers generated and exact, % with 95 % interval. Bytes are tokens.",
    ]
    REPORT.mkdir(parents=True, exist_ok=True)
    for question, (axis_name, meaning) in questions.items():
        of_models = {key.split(", ")[0]: v for key, v in found.items() if key.split(", ")[1] == question}
        if not of_models:
            continue
        figure, axes = plt.subplots(
            1, len(of_models), figsize=(4.4 * len(of_models), 3.2), layout="constrained", squeeze=False
        )
        lines += ["", f"## {question}", "", meaning]
        for axis, (name, kept) in zip(axes[0], sorted(of_models.items()), strict=True):
            rows = kept["rows"]
            arms, places = (list(dict.fromkeys(row[key] for row in rows)) for key in ("arm", "x"))
            cell = {(row["arm"], row["x"]): row for row in rows}
            lines += ["", *table(f"{name}: {axis_name}", cell, arms, places)]
            for arm in arms:
                points = [cell[arm, x] for x in places]
                axis.plot([str(x) for x in places], [100 * p["share"] for p in points], "o-", label=arm)
                axis.fill_between(
                    range(len(places)),
                    [100 * p["low"] for p in points],
                    [100 * p["high"] for p in points],
                    alpha=0.12,
                )
            axis.set(title=name, xlabel=axis_name, ylabel="% right", ylim=(-3, 103))
            # Many names would hide the lines.
            beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(arms) > 8 else {}
            axis.legend(frameon=False, fontsize=8, **beside)
        figure.savefig(REPORT / f"memory-{question}.png", dpi=130)
        plt.close(figure)
        lines += ["", f"![{question}](memory-{question}.png)"]
    told = [f"{name.split(', ')[0]} {v['rank']:.2f}" for name, v in found.items() if "rank" in v]
    if told:
        lines += [
            "",
            f"Rank correlation of surprise with the language model's loss, byte by byte: {', '.join(told)}.",
        ]
    days, machines = (sorted({v[key] for v in found.values()}) for key in ("date", "machine"))
    lines += ["", f"{' and '.join(days)}, {'; '.join(machines)}."]
    (REPORT / "memory.md").write_text("\n".join(lines) + "\n")
