"""Does a model learn without tuning? 100 short runs, each with its own seed, variant and learning rate.

The claim under test: no run meets a NaN or an infinity. Learning rates are log-uniform from 3e-4 to 1e-2; run
number i draws everything from i, so that it is the same run wherever it happens.
"""

from __future__ import annotations

import math
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request
from titans.experiments.tables import markdown
from titans.train import NonFiniteError, TrainingRun, TrainSettings

VARIANTS = ("mac", "mag", "mal", "lmm")
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
LOWEST, HIGHEST = 3e-4, 1e-2
# Thirds of the range that the learning rates are drawn from, so that they are the same for every variant.
THIRDS = np.geomspace(LOWEST, HIGHEST, 4)
SIZE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "memory_depth": 2,
}
RUNS, QUICK_RUNS, STEPS, QUICK_STEPS = 100, 4, 300, 4
BATCH_SIZE, SEQUENCE_LENGTH = 8, 64
LAST_STEPS = 20  # a single step's loss depends on which windows it read
SETTLED_AFTER = 100


class Draw(NamedTuple):
    """What a run's number decides."""

    variant: str
    seed: int
    learning_rate: float


def drawn_run(number: int) -> Draw:
    """The run with this number.

    Variants and learning rates are balanced, or some cells of the table would stay all but empty: four runs
    from a multiple of four on are of four variants, and a variant's first three, next three, … learning rates
    are one from each third of the range.
    """
    block, place = divmod(number, len(VARIANTS))
    # A last number that is not 0 keeps these generators apart from each other and from that of any run.
    which = np.random.default_rng([block, 1]).permutation(len(VARIANTS))[place]
    third = np.random.default_rng([block // 3, which, 2]).permutation(3)[block % 3]
    generator = np.random.default_rng(number)
    seed = int(generator.integers(2**31))
    rate = math.exp(generator.uniform(*np.log(THIRDS[third : third + 2])))
    # Three digits, so that the rate in a report is the one that was used.
    return Draw(VARIANTS[which], seed, float(f"{rate:.2e}"))


class Robustness(Experiment):
    """A cell for each run; `--seeds` is their number."""

    name = "robustness"
    title = "Whether a model learns without tuning"

    def cells(self, request: Request) -> list[Cell]:
        count = request.seeds or (QUICK_RUNS if request.quick else RUNS)
        return [Cell(f"run {number}", drawn := drawn_run(number), drawn.seed) for number in range(count)]

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        """A NaN or an infinity on the way is a result like any other."""
        drawn, steps = cell.settings, QUICK_STEPS if request.quick else STEPS
        losses: list[float] = []
        gradients: list[float] = []
        found: Numbers = {**drawn._asdict(), "held_out": None, "non_finite": None}

        def on_log(line: dict[str, Any]) -> None:
            if line["kind"] == "eval":
                found["held_out"] = line["bits_per_byte"]
            else:
                losses.append(line["loss"] / math.log(2))  # a token is a byte
                gradients.append(line["grad_norm"])
            progress(line["step"], steps)

        with tempfile.TemporaryDirectory(prefix="robustness-") as folder:
            settings = TrainSettings(
                data="excerpt",
                output=Path(folder),
                preset="tiny",
                variant=drawn.variant,
                config=dict(SIZE),
                steps=steps,
                batch_size=BATCH_SIZE,
                sequence_length=SEQUENCE_LENGTH,
                learning_rate=drawn.learning_rate,
                eval_every=steps,
                save_every=steps,
                log_every=1,
                seed=drawn.seed,
                threads=1,  # these tensors are too small to be shared out
            )
            try:
                TrainingRun(settings).run(on_log)
            except NonFiniteError as error:
                what, _, _ = str(error).partition(" at step ")
                found["non_finite"] = {"step": min(len(losses) + 1, steps), "what": what}
        return found | {
            "loss": None if found["non_finite"] else float(np.mean(losses[-LAST_STEPS:])),
            "worst_loss": max(losses[SETTLED_AFTER:], default=None),
            "grad_norm": max(gradients, default=None),
        }

    def table(self, results: Results) -> str:
        runs = list(results.cells.values())
        bad = [(name, run) for name, run in results.cells.items() if run["non_finite"] is not None]
        failures = [
            f"- {name} ({run['variant']}, learning rate {run['learning_rate']:.2e}, seed {run['seed']}) at "
            f"step {run['non_finite']['step']}: {run['non_finite']['what']}"
            for name, run in bad
        ]
        rows, slopes = [], []
        for variant in VARIANTS:
            own = [run for run in runs if run["variant"] == variant]
            for place, (low, high) in enumerate(pairwise(THIRDS)):
                some = [run for run in own if third_of(run["learning_rate"]) == place]
                rows.append(row(variant, f"{low:.1e} to {high:.1e}", some))
            rows.append(row(variant, "all", own))
            slopes += [slope(variant, own)]
        rows.append(row("all", "all", runs))
        head = ["variant", "learning rate", "runs", "non-finite", "min", "10 %", "median", "90 %", "max"]
        parts = [
            f"Tiny preset with width {SIZE['hidden_size']}, {SIZE['num_hidden_layers']} layers and "
            f"{SIZE['num_attention_heads']} heads of {SIZE['head_dim']}, {STEPS} steps of {BATCH_SIZE} × "
            f"{SEQUENCE_LENGTH} bytes of the vendored text, one thread for each run; seeds random, learning "
            f"rates log-uniform from {LOWEST:g} to {HIGHEST:g}, a third of each variant's from each third of "
            "that range, everything else the library's default.",
            f"**{len(runs)} runs, {len(bad)} with a NaN or an infinity** (goal: 0).",
            "\n".join(failures),
            f"Final loss in bits per byte, the mean of the last {LAST_STEPS} steps, by variant and third of "
            "the range of learning rates. Non-finite runs are in no quantile. Held out: median bits per byte "
            f"of one act, in windows of {SEQUENCE_LENGTH} bytes, each from an empty state.",
            markdown([*head, "held out"], rows),
            "How much worse the worst third of the learning rates is than the best, by median final loss: "
            + ", ".join(filter(None, slopes))
            + ".",
            extremes(results),
        ]
        return "\n\n".join(part for part in parts if part)

    def draw(self, results: Results, folder: Path) -> dict[str, str]:
        """Final loss against learning rate; runs that have no final loss are crosses at the top."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for variant, colour in zip(VARIANTS, COLOURS, strict=True):
            own = [run for run in results.cells.values() if run["variant"] == variant]
            good = [run for run in own if run["loss"] is not None]
            rates, losses = ([run[key] for run in good] for key in ("learning_rate", "loss"))
            axes.scatter(rates, losses, s=18, color=colour, label=variant)
            bad = [run["learning_rate"] for run in own if run["loss"] is None]
            top = axes.get_xaxis_transform()
            axes.scatter(bad, [0.97] * len(bad), marker="x", color=colour, transform=top)
        for border in THIRDS[1:3]:
            axes.axvline(border, color="grey", linewidth=0.8, linestyle=":")
        axes.set(
            title="one point is one run",
            xscale="log",
            xlabel="peak learning rate",
            ylabel="final loss (bits per byte)",
        )
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / f"{self.name}.png", dpi=90)
        return {f"{self.name}.png": "Final loss by learning rate"}


def third_of(learning_rate: float) -> int:
    """0, 1 or 2: the third of the range that a learning rate lies in."""
    return int(np.searchsorted(THIRDS[1:3], learning_rate, side="right"))


def finite_losses(runs: list[Numbers]) -> list[float]:
    """The final losses of the runs that have one."""
    return [run["loss"] for run in runs if run["loss"] is not None]


def row(variant: str, rates: str, runs: list[Numbers]) -> list[str]:
    """One line of the table: how the final losses of some runs are spread."""
    non_finite = sum(run["non_finite"] is not None for run in runs)
    cells = ["–"] * 6
    if losses := finite_losses(runs):
        spread = np.quantile(losses, [0, 0.1, 0.5, 0.9, 1])
        held_out = np.median([run["held_out"] for run in runs if run["held_out"] is not None])
        cells = [f"{value:.3f}" for value in (*spread, held_out)]
    return [variant, rates, str(len(runs)), str(non_finite), *cells]


def slope(variant: str, runs: list[Numbers]) -> str | None:
    """How much the choice of the learning rate matters to a variant, in a few words."""
    medians = {}
    for place, name in enumerate(("low", "middle", "high")):
        if losses := finite_losses([run for run in runs if third_of(run["learning_rate"]) == place]):
            medians[name] = float(np.median(losses))
    if len(medians) < 2:
        return None
    best, worst = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
    return f"{variant} {100 * (medians[worst] / medians[best] - 1):+.1f} % ({worst} compared with {best})"


def extremes(results: Results) -> str:
    """The two numbers that would show a run which came close to failing, in one sentence each."""
    sentences = []
    for key, what, digits in (
        ("grad_norm", "gradient norm before clipping", 2),
        ("worst_loss", f"loss of a single step after step {SETTLED_AFTER}", 3),
    ):
        known = {name: run for name, run in results.cells.items() if run[key] is not None}
        if known:
            name = max(known, key=lambda n: known[n][key])
            median, worst = np.median([run[key] for run in known.values()]), known[name]
            sentences.append(
                f"Largest {what} of a run: median {median:.{digits}f}, at most {worst[key]:.{digits}f} "
                f"({name}, {worst['variant']}, {worst['learning_rate']:.2e})."
            )
    return " ".join(sentences)
