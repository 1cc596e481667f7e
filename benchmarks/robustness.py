"""Does a model learn without tuning? 100 short runs, each with its own seed, variant and learning rate.

    python benchmarks/robustness.py               # all runs, or those still missing; then table and picture
    python benchmarks/robustness.py --worker 0/2  # every second run; beside it, another process with 1/2
    python benchmarks/robustness.py --minutes 20  # begins no run after that; call it again for the rest

The claim under test: no run meets a NaN or an infinity. Learning rates are log-uniform from 3e-4 to 1e-2; run
number i draws everything from i, so it is the same run wherever it happens. Runs are kept in runs/robustness
and repeated only if the library's defaults for the memory have changed since; an interrupted one starts
again. The table goes to benchmarks/results/robustness.md and .json, the picture to robustness.png.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import math
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from titans.hf import TitansConfig, TitansForCausalLM
from titans.nn import NeuralMemory
from titans.train import NonFiniteError, TrainingRun, TrainSettings
from titans.train.checkpoint import write_bytes, write_json

VARIANTS = ("mac", "mag", "mal", "lmm")
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
LOWEST, HIGHEST = 3e-4, 1e-2
# Thirds of the range that the learning rates are drawn from, so that they are the same for every variant.
THIRDS = np.geomspace(LOWEST, HIGHEST, 4)
PRESET = "tiny"
SIZE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
}
BATCH_SIZE, SEQUENCE_LENGTH = 8, 64
LAST_STEPS = 20  # a single step's loss depends on which windows it read
SETTLED_AFTER = 100
RESULTS = Path(__file__).parent / "results"

Result = dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """What a run's number decides."""

    number: int
    variant: str
    seed: int
    learning_rate: float


def draw(number: int) -> Draw:
    """The run with this number.

    Chance is held to an even hand, or some cells of the table would stay all but empty: four runs from a
    multiple of four on are of four variants, and a variant's first three, next three, … learning rates are
    one from each third of the range.
    """
    block, place = divmod(number, len(VARIANTS))
    # A last number that is not 0 keeps these generators apart from each other and from that of any run.
    which = np.random.default_rng([block, 1]).permutation(len(VARIANTS))[place]
    part = np.random.default_rng([block // 3, which, 2]).permutation(3)[block % 3]
    generator = np.random.default_rng(number)
    seed = int(generator.integers(2**31))
    rate = math.exp(generator.uniform(*np.log(THIRDS[part : part + 2])))
    # Three digits, so that the rate in a report is the one that was used.
    return Draw(number, VARIANTS[which], seed, float(f"{rate:.2e}"))


@cache
def conditions(variant: str, steps: int) -> Result:
    """What all runs have in common; a kept run counts only while this is unchanged.

    The memory is recorded field by field, and the bound on its step size as the layer resolves it.
    """
    config = TitansConfig.from_preset(PRESET, variant=variant, **SIZE)
    memories = [m for m in TitansForCausalLM(config).modules() if isinstance(m, NeuralMemory)]
    decide = [name for name in TitansConfig.__annotations__ if name.startswith("memory_")]
    return {
        "preset": PRESET,
        **SIZE,
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "sequence_length": SEQUENCE_LENGTH,
        **{name: getattr(config, name) for name in (*decide, "chunk_size", "conv_kernel")},
        "max_step_size": memories[0].max_step_size,
    }


def run_file(folder: Path, number: int, steps: int) -> Path:
    """Where a run's result is kept."""
    return folder / f"{number:03}-{steps}.json"


def kept_result(folder: Path, number: int, steps: int) -> Result | None:
    """The result of a run, unless it is missing or was made under other conditions."""
    path = run_file(folder, number, steps)
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    drawn = draw(number)
    current = kept["conditions"] == conditions(drawn.variant, steps)
    same_draw = all(kept[name] == value for name, value in asdict(drawn).items())
    return kept if current and same_draw else None


def run_one(drawn: Draw, steps: int) -> Result:
    """Train one model; a NaN or an infinity on the way is a result like any other."""
    started = time.perf_counter()
    losses: list[float] = []
    grad_norms: list[float] = []
    held_out: float | None = None

    def on_log(line: dict[str, Any]) -> None:
        nonlocal held_out
        if line["kind"] == "eval":
            held_out = line["bits_per_byte"]
        else:
            losses.append(line["loss"] / math.log(2))  # a token is a byte
            grad_norms.append(line["grad_norm"])

    non_finite: Result | None = None
    with tempfile.TemporaryDirectory(prefix="robustness-") as folder:
        run = TrainingRun(
            TrainSettings(
                data="excerpt",
                output=Path(folder),
                preset=PRESET,
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
        )
        try:
            run.run(on_log)
        except NonFiniteError as error:
            what, _, _ = str(error).partition(" at step ")
            non_finite = {"step": min(len(losses) + 1, steps), "what": what}
    return {
        **asdict(drawn),
        "loss": float(np.mean(losses[-LAST_STEPS:])) if non_finite is None else None,
        "worst_loss": max(losses[SETTLED_AFTER:], default=None),
        "held_out": held_out,
        "grad_norm": max(grad_norms, default=None),
        "non_finite": non_finite,
        "seconds": round(time.perf_counter() - started, 2),
        "conditions": conditions(drawn.variant, steps),
    }


def third(learning_rate: float) -> int:
    """0, 1 or 2: the third of the range that a learning rate lies in."""
    return int(np.searchsorted(THIRDS[1:3], learning_rate, side="right"))


def finite_losses(results: list[Result]) -> list[float]:
    """The final losses of the runs that have one."""
    return [result["loss"] for result in results if result["loss"] is not None]


def row(variant: str, rates: str, results: list[Result]) -> str:
    """One line of the table: how the final losses of some runs are spread."""
    non_finite = sum(result["non_finite"] is not None for result in results)
    cells = ["–"] * 6
    if losses := finite_losses(results):
        spread = np.quantile(losses, [0, 0.1, 0.5, 0.9, 1])
        held_out = np.median([r["held_out"] for r in results if r["held_out"] is not None])
        cells = [f"{value:.3f}" for value in (*spread, held_out)]
    return f"| {variant} | {rates} | {len(results)} | {non_finite} | {' | '.join(cells)} |"


def slope(variant: str, results: list[Result]) -> str | None:
    """How much the choice of the learning rate matters to a variant, in a few words."""
    names = ("low", "middle", "high")
    medians = {}
    for place, name in enumerate(names):
        if losses := finite_losses([r for r in results if third(r["learning_rate"]) == place]):
            medians[name] = float(np.median(losses))
    if len(medians) < 2:
        return None
    best, worst = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
    return f"{variant} {100 * (medians[worst] / medians[best] - 1):+.1f} % ({worst} against {best})"


def machine_line(steps: int) -> str:
    """When, where and how the runs were made."""
    return (
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; "
        f"`python benchmarks/robustness.py`; {PRESET} preset with width {SIZE['hidden_size']}, "
        f"{SIZE['num_hidden_layers']} layers and {SIZE['num_attention_heads']} heads of {SIZE['head_dim']}, "
        f"{steps} steps of {BATCH_SIZE} × {SEQUENCE_LENGTH} bytes of the vendored text, one thread for each "
        f"run; seeds random, learning rates log-uniform from {LOWEST:g} to {HIGHEST:g}, a third of each "
        "variant's from each third of that range, everything else the library's default."
    )


def table(results: list[Result], steps: int) -> str:
    """The runs as Markdown."""
    bad = [result for result in results if result["non_finite"] is not None]
    lines = [
        machine_line(steps),
        "",
        f"**{len(results)} runs, {len(bad)} with a NaN or an infinity** (goal: 0).",
        "",
        *(
            f"- run {r['number']} ({r['variant']}, learning rate {r['learning_rate']:.2e}, seed {r['seed']}) "
            f"at step {r['non_finite']['step']}: {r['non_finite']['what']}"
            for r in bad
        ),
        *([""] if bad else []),
        f"Final loss in bits per byte, the mean of the last {LAST_STEPS} steps, by variant and third of the "
        "range of learning rates. Non-finite runs are in no quantile. Held out: median bits per byte of one "
        f"act, in windows of {SEQUENCE_LENGTH} bytes, each with a fresh state.",
        "",
        "| variant | learning rate | runs | non-finite | min | 10 % | median | 90 % | max | held out |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    slopes = []
    for variant in VARIANTS:
        own = [result for result in results if result["variant"] == variant]
        for place, (low, high) in enumerate(pairwise(THIRDS)):
            some = [result for result in own if third(result["learning_rate"]) == place]
            lines.append(row(variant, f"{low:.1e} to {high:.1e}", some))
        lines.append(row(variant, "all", own))
        slopes.append(slope(variant, own))
    lines += [row("all", "all", results), ""]
    if known := [words for words in slopes if words]:
        lines += [
            "How much worse the worst third of the learning rates is than the best, by median final loss: "
            + ", ".join(known)
            + ".",
            "",
        ]
    lines.append(extremes(results))
    lines += ["", "![final loss against learning rate](robustness.png)"]
    return "\n".join(lines) + "\n"


def extremes(results: list[Result]) -> str:
    """The two numbers that would betray a run which came close, in one sentence each."""
    sentences = []
    for key, name, digits in (
        ("grad_norm", "gradient norm before clipping", 2),
        ("worst_loss", f"loss of a single step after step {SETTLED_AFTER}", 3),
    ):
        known = [result for result in results if result[key] is not None]
        if known:
            worst = max(known, key=lambda result: result[key])
            median = np.median([result[key] for result in known])
            sentences.append(
                f"Largest {name} of a run: median {median:.{digits}f}, at most {worst[key]:.{digits}f} (run "
                f"{worst['number']}, {worst['variant']}, {worst['learning_rate']:.2e})."
            )
    return " ".join(sentences)


def picture(results: list[Result]) -> bytes:
    """Final loss against learning rate as a PNG; runs that have no final loss are crosses at the top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for variant, colour in zip(VARIANTS, COLOURS, strict=True):
        own = [result for result in results if result["variant"] == variant]
        good = [result for result in own if result["loss"] is not None]
        axes.scatter(
            [result["learning_rate"] for result in good],
            [result["loss"] for result in good],
            s=18,
            color=colour,
            label=variant,
        )
        bad = [result["learning_rate"] for result in own if result["loss"] is None]
        axes.scatter(bad, [0.97] * len(bad), marker="x", color=colour, transform=axes.get_xaxis_transform())
    for border in THIRDS[1:3]:
        axes.axvline(border, color="grey", linewidth=0.8, linestyle=":")
    axes.set(
        title="no tuning: one point is one run",
        xscale="log",
        xlabel="peak learning rate",
        ylabel="final loss (bits per byte)",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=90)
    return image.getvalue()


def report(results: list[Result], steps: int, folder: Path) -> None:
    """Print the table, and write it, the measurements and the picture."""
    text = table(results, steps)
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "robustness.md", text.encode())
    runs = [{key: value for key, value in r.items() if key != "conditions"} for r in results]
    content = {"machine": machine_line(steps), "conditions": results[0]["conditions"], "runs": runs}
    write_bytes(folder / "robustness.json", (json.dumps(content, indent=1) + "\n").encode())
    write_bytes(folder / "robustness.png", picture(results))


def show(result: Result, done: int, total: int, started: float) -> None:
    """One line of progress on stderr."""
    left = round((time.perf_counter() - started) / done * (total - done))
    bad = result["non_finite"]
    outcome = f"step {bad['step']}: {bad['what']}" if bad else f"loss {result['loss']:.3f} bits/byte"
    print(
        f"run {result['number']} ({done} of {total}) · {result['variant']} · "
        f"learning rate {result['learning_rate']:.2e} · {outcome} · {result['seconds']:.1f} s · "
        f"{left // 60}:{left % 60:02} left",
        file=sys.stderr,
        flush=True,
    )


def worker(text: str) -> tuple[int, int]:
    """k/n as two numbers."""
    place, separator, total = text.partition("/")
    if not (separator and place.isdecimal() and total.isdecimal() and int(place) < int(total)):
        raise argparse.ArgumentTypeError(f"{text!r}: give k/n with k from 0 to n - 1, as in 0/2")
    return int(place), int(total)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=positive, default=100, help="number of runs")
    parser.add_argument("--steps", type=positive, default=300, help="optimizer steps of a run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after this time")
    parser.add_argument("--worker", type=worker, default=(0, 1), help="k/n: only runs i with i %% n == k")
    parser.add_argument("--runs", type=Path, default=Path("runs/robustness"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    place, total = arguments.worker
    own = range(place, arguments.count, total)
    started = time.perf_counter()
    missing = [i for i in own if kept_result(arguments.runs, i, arguments.steps) is None]
    if missing:
        arguments.runs.mkdir(parents=True, exist_ok=True)
    for done, number in enumerate(missing, 1):
        if time.perf_counter() - started > 60 * arguments.minutes:
            break
        try:
            result = run_one(draw(number), arguments.steps)
        except KeyboardInterrupt:
            print(f"interrupted: run {number} will start again, the others are kept", file=sys.stderr)
            return 130
        write_json(run_file(arguments.runs, number, arguments.steps), result)
        show(result, done, len(missing), started)
    found = [kept_result(arguments.runs, i, arguments.steps) for i in range(arguments.count)]
    results = [result for result in found if result is not None]
    if len(results) < arguments.count:
        print(f"{arguments.count - len(results)} of {arguments.count} runs are missing", file=sys.stderr)
        return 0
    report(results, arguments.steps, arguments.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
