"""Train a small model that predicts text and remembers facts from far back: the recipe of the models to try.

    python -m titans.experiments.recall --variant lmm --output runs/lmm    # 45 minutes on one core
    python -m titans.experiments.recall --variant lmm --output runs/plain --plain    # without facts

Interrupted, the same command goes on where it stopped. The model is in the last stage's folder.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from titans.train import Interrupted, TrainSettings, train
from titans.train.checkpoint import checkpoints
from titans.train.progress import ProgressLine

CORPUS = "shakespeare"


def stages(variant: str, output: Path, plain: bool = False, **changes: Any) -> list[TrainSettings]:
    """Settings one after the other, each going on from the weights of the one before.

    near: facts are asked for within 256 bytes, often; what a memory has to do is learned here. far: within
    1,024 bytes of rows of 2,048, every fourth of which begins with the memory that another row has left.

    Args:
        plain: the same text without facts.
        changes: of every stage's settings.
    """
    memory = variant != "transformer"
    near = TrainSettings(
        data=CORPUS,
        output=output / "near",
        variant=variant,
        config={"initializer_range": 0.1, **({"memory_induction_init": True} if memory else {})},
        steps=1500,
        batch_size=8,
        sequence_length=512,
        fact_spacing=None if plain else 150.0,
        fact_distance=256,
        learning_rate=5e-3,
        min_learning_rate=0.4,
        eval_every=500,
    )
    far = replace(
        near,
        output=output / "far",
        start_from=near.output,
        steps=600,
        batch_size=4,
        sequence_length=2048,
        fact_spacing=None if plain else 300.0,
        fact_distance=1024,
        state_passing=0.25 if memory else 0.0,
        learning_rate=2e-3,
        min_learning_rate=0.1,
        eval_every=400,
        seed=1,
    )
    return [replace(stage, **changes) for stage in (near, far)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="lmm", choices=["lmm", "mac", "mag", "mal", "transformer"])
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--plain", action="store_true", help="the same text without facts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    planned = stages(arguments.variant, arguments.output, arguments.plain, threads=arguments.threads)
    try:
        for settings in planned:
            if (settings.output / "model.safetensors").exists():
                continue
            settings = replace(settings, resume=bool(checkpoints(settings.output)))
            print(f"{settings.output}: {settings.steps} steps", file=sys.stderr)
            with ProgressLine(settings.steps, bytes_are_tokens=True) as progress:
                train(settings, progress)
    except Interrupted as error:
        print(f"titans: {error}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"titans: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
