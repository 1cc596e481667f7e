"""Train a small model that predicts text and remembers facts from far back: the recipe of the models to try.

    python -m titans.experiments.recipe --variant lmm --output runs/lmm    # an hour on one core
    python -m titans.experiments.recipe --variant lmm --output runs/lmm --gpu    # four times the text
    python -m titans.experiments.recipe --variant lmm --output runs/plain --plain    # without facts

Interrupted, the same command goes on where it stopped. The model is in the last stage's folder.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from titans.nn.blocks import BLOCKS, has_memory
from titans.train import FactSettings, Interrupted, TrainSettings, train
from titans.train.checkpoint import checkpoints
from titans.train.metrics import read_metrics
from titans.train.progress import ProgressLine

CORPUS = "shakespeare"


def stages(
    variant: str, output: Path, plain: bool = False, gpu: bool = False, **changes: Any
) -> list[TrainSettings]:
    """Settings one after the other, each going on from the weights of the one before.

    dense: facts in every line, asked for at once, so that the one fact there is has to be distinguished from
        the text and not from other facts; what a memory has to do is learned here, in minutes.
    near: fewer facts, asked for within 1,024 bytes.
    far: text with a fact in every 1,500 bytes, asked for within 16,384, read in order with the memory carried
        over. Facts have to survive all text between, and writing what will not be asked for has a price
        (`titans.train.write_cost`).
    hold: the same at a higher price, which steps of some millionths pay too: in a million bytes they add up.

    On a GPU far is seven times as long, in rows of 4,096 bytes, with facts asked for within 65,536 and no
    price yet; keep is the far stage of a CPU, and hold follows.

    Args:
        plain: the same text without facts.
        gpu: with the stages that need a CUDA device, or an hour and a half for each of them.
        changes: of every stage's settings.
    """
    remembers = has_memory(variant)
    config: dict[str, Any] = {"initializer_range": 0.1}
    if remembers:
        config["memory_depth"] = 2
        config["memory"] = {
            "form": "recall",
            "start": "induction",
            # Keys see fifteen bytes, as many as four tokens of some four bytes have.
            "conv_kernel": 16,
            # The first head is a short-term memory, whatever it learns; the last need not forget.
            "half_lives": [1024.0, 1e9],
            "combination": "sum" if variant in ("mac", "mag") else "gate",
        }
    none = FactSettings()

    def changed(stage: TrainSettings, **fields: Any) -> FactSettings:
        return none if plain else replace(stage.facts, **fields)

    dense = TrainSettings(
        data=CORPUS,
        output=output / "dense",
        variant=variant,
        config=config,
        steps=200,
        batch_size=8,
        sequence_length=512,
        facts=none if plain else FactSettings(spacing=60.0, distance=48, answer_weight=10.0),
        learning_rate=5e-3,
        min_learning_rate=0.8,
        eval_every=200,
    )
    near = replace(
        dense,
        output=output / "near",
        start_from=dense.output,
        steps=300,
        sequence_length=1024,
        facts=changed(dense, spacing=400.0, distance=1024, refrains=0.15, numbered_lines=0.25, alike=0.5),
        learning_rate=4e-3,
        min_learning_rate=0.7,
        eval_every=200,
        seed=1,
    )
    far = replace(
        near,
        output=output / "far",
        start_from=near.output,
        steps=600,
        sequence_length=2048,
        facts=changed(near, spacing=1500.0, distance=16384, write_cost=0.03 if remembers else 0.0),
        carry_memory=remembers,
        in_order=not remembers,
        learning_rate=3e-3,
        min_learning_rate=0.1,
        seed=2,
    )
    hold = replace(
        far,
        output=output / "hold",
        start_from=far.output,
        steps=400,
        facts=changed(far, write_cost=far.facts.write_cost and 0.1, write_cost_reach=12.0),
        learning_rate=2e-3,
        seed=4,
    )
    planned = [dense, near, far, hold]
    if gpu:
        keep = replace(
            far, output=output / "keep", start_from=far.output, steps=220, learning_rate=2e-3, seed=3
        )
        hold = replace(hold, start_from=keep.output, steps=350)
        far = replace(
            far,
            steps=1020,
            batch_size=16,
            sequence_length=4096,
            facts=changed(far, distance=4 * far.facts.distance, write_cost=0.0),
            dtype="tfloat32",
            cuda_graph=True,
        )
        planned = [dense, near, far, keep, hold]
    return [replace(stage, **changes) for stage in planned]


def run_stage(settings: TrainSettings) -> float | None:
    """Train a stage, or what is left of it; returns the held-out bits per byte at its end.

    Raises:
        Interrupted: with what is done saved.
    """
    metrics = settings.output / "metrics.jsonl"
    if not (settings.output / "model.safetensors").exists():
        settings = replace(settings, resume=bool(checkpoints(settings.output)))
        print(f"{settings.output}: {settings.steps} steps", file=sys.stderr)
        with ProgressLine(settings.steps, bytes_are_tokens=True) as progress:
            train(settings, progress)
    evaluated = [line for line in read_metrics(metrics) if line["kind"] == "eval"]
    return evaluated[-1]["bits_per_byte"] if evaluated else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="lmm", choices=sorted(BLOCKS))
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--plain", action="store_true", help="the same text without facts")
    parser.add_argument("--gpu", action="store_true", help="the longer far stage, on a CUDA device")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    planned = stages(
        arguments.variant, arguments.output, arguments.plain, arguments.gpu, threads=arguments.threads
    )
    try:
        for settings in planned:
            run_stage(settings)
    except Interrupted as error:
        print(f"titans: {error}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"titans: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
