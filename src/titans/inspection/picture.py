"""An inspection drawn as one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from titans.inspection.grafted import GraftInspection
from titans.inspection.measure import Inspection

_POINTS = 300


def draw_inspection(path: Path, found: Inspection, title: str) -> None:
    """Write a PNG: surprise, gain in prediction from the memory, step sizes, norms of the fast weights."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(found.ids)
    step = max(count // _POINTS, 1)
    figure, axes = plt.subplots(4, figsize=(9, 9), sharex=True, layout="constrained")
    for layer in range(found.surprise.shape[1]):
        axes[0].plot(*_means(found.surprise[:, layer], step), lw=0.9, label=f"layer {layer}")
    axes[0].set_ylabel("surprise ‖M(k) − v‖²")
    for values, name in (
        (found.helped, "compared with no memory"),
        (found.helped_over_another, "compared with another text's memory"),
    ):
        axes[1].plot(*_means(values, step), lw=0.9, label=name)
    axes[1].axhline(0, color="#999", lw=0.6)
    axes[1].set_ylabel("gain from this text's memory\nin nats per token")
    norm_steps = np.minimum((np.arange(len(found.memory_norm)) + 1) * found.passage_length, count)
    for layer in range(found.step_size.shape[1]):
        for head in range(found.step_size.shape[2]):
            name = f"layer {layer}, head {head}"
            axes[2].plot(*_means(found.step_size[:, layer, head], step), lw=0.9, label=name)
            axes[3].plot(norm_steps, found.memory_norm[:, layer, head], lw=0.9, label=name)
    axes[2].set_yscale("log")
    axes[2].set_ylabel("step size θ")
    axes[3].set_ylabel("norm of the fast weights")
    axes[3].set_xlabel("tokens read")
    for axis in axes:
        axis.legend(frameon=False, fontsize=7, ncols=3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_graft_inspection(path: Path, found: GraftInspection, title: str) -> None:
    """Write a PNG: loss with and without a graft's memory, gain, and nats saved so far, over the text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    step = max(len(found.ids) // _POINTS, 1)
    figure, axes = plt.subplots(3, figsize=(9, 7), sharex=True, layout="constrained")
    for values, name in ((found.base, "without"), (found.loss, "with the memory")):
        axes[0].plot(*_means(values, step), lw=0.9, label=name)
    axes[0].set_ylabel("loss\nin nats per token")
    axes[0].legend(frameon=False, fontsize=7, ncols=2)
    axes[1].plot(*_means(found.helped, step), lw=0.9)
    axes[1].set_ylabel("gain\nin nats per token")
    axes[2].plot(np.arange(1, len(found.ids)), found.helped[1:].cumsum(dtype=np.float64), lw=0.9)
    axes[2].set_ylabel("nats saved so far")
    axes[2].set_xlabel("tokens read")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1:]:
        axis.axhline(0, color="#999", lw=0.6)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _means(values: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Middles and means of stretches of `step` tokens."""
    begins = np.arange(0, len(values), step)
    stretches = [stretch[~np.isnan(stretch)] for stretch in np.split(values, begins[1:])]
    return begins + step / 2, np.array(
        [np.mean(stretch) if len(stretch) else np.nan for stretch in stretches]
    )
