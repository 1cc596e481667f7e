"""The familiar picture: accuracy by length and depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from titans.evaluate.needle import NeedleCell

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_heat_maps(path: Path, tables: Mapping[str, Sequence[NeedleCell]], title: str) -> None:
    """Write the picture of one `needle_table` or several, each under its name; hatched where attention can
    reach the needle."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(len({cell.length for cell in cells}) for cells in tables.values())
    heights = [1.3 + 0.4 * len({cell.depth for cell in cells}) for cells in tables.values()]
    figure, axes = plt.subplots(
        len(tables),
        figsize=(2.4 + 0.95 * columns, sum(heights) + 0.4),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, cells) in zip(axes[:, 0], tables.items(), strict=True):
        _draw(axis, cells)
        axis.set_title(f"{name}, % exact", fontsize=9)
    axes[-1, 0].set_xlabel("tokens read")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(axis: Axes, cells: Sequence[NeedleCell]) -> None:
    from matplotlib.patches import Rectangle

    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells}, key=lambda depth: depth or 0)
    grid = [[float("nan")] * len(lengths) for _ in depths]
    for cell in cells:
        x, y = lengths.index(cell.length), depths.index(cell.depth)
        grid[y][x] = 100 * cell.accuracy
        axis.text(x, y, f"{100 * cell.accuracy:.0f}", ha="center", va="center", fontsize=8)
        if not cell.beyond_attention:
            axis.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="///", linewidth=0, alpha=0.4)
            )
    axis.imshow(grid, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    axis.set_yticks(range(len(depths)), ["anywhere" if d is None else f"{100 * d:.0f} %" for d in depths])
    axis.set_ylabel("depth")
