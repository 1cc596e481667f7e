"""The picture of the comparison: prediction by position, and recall by length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from titans.experiments.graft_comparison_found import (
    RANGES,
    Cells,
    names_in_order,
    predictions,
    recall_by_length,
)
from titans.experiments.graft_comparison_texts import SAMPLES

PICTURE = "graft-comparison.png"
ABOUT_PICTURE = (
    "Left and above: change of the loss against the window by position, below 0 is better; last: single "
    "facts recalled by length of the haystack"
)
_COLUMNS = 3


def draw(cells: Cells, path: Path) -> bool:
    """Write the picture; False where nothing is measured."""
    documents = [*dict.fromkeys(name.split(", ")[1] for name in cells if name.startswith("prediction, "))]
    found = {document: predictions(cells, document) for document in documents}
    found = {document: systems for document, systems in found.items() if "window" in systems}
    recalled = recall_by_length(cells, ["one"])
    if not found and not recalled:
        return False
    from matplotlib.figure import Figure

    names = names_in_order([*recalled, *(name for systems in found.values() for name in systems)])
    style = {
        name: dict(color=f"C{i % 10}", linestyle="-" if i < 10 else "--") for i, name in enumerate(names)
    }
    panels = len(found) + bool(recalled)
    rows = -(-panels // _COLUMNS)
    figure = Figure(figsize=(4.2 * min(panels, _COLUMNS), 3.2 * rows + 0.6), layout="constrained")
    axes: list[Any] = [*figure.subplots(rows, min(panels, _COLUMNS), squeeze=False).flat]
    for axis, (document, systems) in zip(axes, found.items(), strict=False):
        for name, cell in systems.items():
            if name != "window" and cell.changes:
                axis.plot(
                    range(len(cell.changes)),
                    cell.changes,
                    marker="o",
                    markersize=3,
                    label=name,
                    **style[name],
                )
        count = max(len(cell.changes) for cell in systems.values())
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(count), [_short(begin, end) for begin, end in RANGES[:count]], fontsize=8)
        axis.set(title=document, xlabel="tokens", ylabel="change of the loss, %")
    if recalled:
        axis = axes[len(found)]
        for name in names_in_order(recalled):
            lengths = sorted(recalled[name])
            shares = [100 * recalled[name][n][0] / recalled[name][n][1] for n in lengths]
            axis.plot(lengths, shares, marker="o", markersize=3, label=name, **style[name])
        axis.set_xscale("log", base=2)
        axis.set_xticks([*SAMPLES], [f"{n // 1024}K" for n in SAMPLES])
        axis.set(title="single facts", xlabel="tokens of the haystack", ylabel="recalled, %", ylim=(-3, 103))
    for axis in axes[panels:]:
        axis.remove()
    handles = {
        label: h for axis in axes[:panels] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        [handles[name] for name in names if name in handles],
        [name for name in names if name in handles],
        loc="outside lower center",
        ncols=2 * min(panels, _COLUMNS),
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path, dpi=110)
    return True


def _short(begin: int, end: int) -> str:
    """A range in thousands of tokens."""
    return f"{begin / 1024:g}–{end / 1024:g}K"
