"""The familiar picture: accuracy by length and depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from titans.evaluate.needle import NeedleCell


def draw_heat_map(path: Path, cells: Sequence[NeedleCell], title: str) -> None:
    """Write the picture of a `needle_table`; hatched where attention can reach the needle."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells}, key=lambda depth: depth or 0)
    figure, axis = plt.subplots(figsize=(1.6 + 0.95 * len(lengths), 1.6 + 0.55 * len(depths)))
    grid = [[float("nan")] * len(lengths) for _ in depths]
    for cell in cells:
        x, y = lengths.index(cell.length), depths.index(cell.depth)
        grid[y][x] = 100 * cell.accuracy
        axis.text(x, y, f"{100 * cell.accuracy:.0f}", ha="center", va="center", fontsize=8)
        if not cell.beyond_attention:
            axis.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="///", linewidth=0, alpha=0.4)
            )
    image = axis.imshow(grid, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30, ha="right")
    axis.set_yticks(range(len(depths)), ["anywhere" if d is None else f"{100 * d:.0f} %" for d in depths])
    axis.set(xlabel="tokens read", ylabel="depth of the needle", title=f"{title}, % exact")
    axis.title.set_fontsize(9)
    figure.colorbar(image, ax=axis)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
