"""One recipe for all systems: the same tokens and the same number of learning rates, chosen on validation."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from titans.baselines.systems import SYSTEMS, load_system, parse_parameters
from titans.experiments.reproduce.vocabulary import bpe_tokenizer
from titans.experiments.results import Numbers
from titans.experiments.runner import Progress
from titans.stream.reader import Reader
from titans.train import FactSettings, NonFiniteError, TrainingRun, TrainSettings
from titans.train.checkpoint import checkpoints, write_json

# Tokens a second of processor time that systems of a million parameters were trained at, in rows of 256
# tokens, on one busy core; for the plan alone.
SPEEDS = {
    "lmm": 3300, "mac": 2100, "mag": 3100, "mal": 3000, "lmm-linear": 3600, "window": 3900, "lstm": 5100,
    "rwkv7": 1300, "deltanet": 2300, "momentum-deltanet": 2500, "ttt-linear": 4700, "ttt-mlp": 4600,
    "transformer": 7000, "mamba": 500, "mamba2": 1300, "gated-deltanet": 1800, "kda": 320,
    "recurrent-gemma": 2400,
}  # fmt: skip
# The power of a system's size that a token's time grows by. Below a million parameters it is lower where a
# part of that time is of one size, as the states of Mamba-2 and what TTT's MLP computes for a chunk.
_POWER, _POWERS_BELOW_A_MILLION = 0.75, {"mamba2": 0.5, "ttt-mlp": 0.6}
# Seconds for a run's data, checkpoint and model, and for a cell's own: sizes, curves, loading.
RUN_SECONDS, CELL_SECONDS = 0.7, 3.0
# A forward pass takes a third of a step of training.
FORWARD = 1 / 3


def speed(system: str, parameters: str) -> float:
    """Tokens a second of processor time in training, by `SPEEDS`, for the plan."""
    size = parse_parameters(parameters) / 1e6
    power = _POWERS_BELOW_A_MILLION.get(system, _POWER) if size < 1 else _POWER
    return SPEEDS.get(system, 2000) / size**power


@dataclass(frozen=True)
class Recipe:
    """How every system of a table is trained.

    data: the corpus. parameters: sizes. steps, batch_size, length: of the training. rates: learning rates,
    of which the one with the lowest loss on validation documents after `search_steps` is taken. validation:
    tokens of these documents. facts: of `TrainSettings`. vocabulary: tokens of a BPE that is trained on the
    corpus; None for bytes.
    """

    data: str = "encyclopaedia"
    parameters: tuple[str, ...] = ("1M",)
    steps: int = 300
    search_steps: int = 75
    batch_size: int = 16
    length: int = 256
    validation: int = 32768
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    facts: FactSettings = field(default_factory=FactSettings)
    vocabulary: int | None = None

    def tokenizer(self, folder: Path) -> str:
        """As `TrainSettings` has it; a folder in `folder`, where one is trained."""
        if self.vocabulary is None:
            return TrainSettings.tokenizer
        return str(bpe_tokenizer(self.data, self.vocabulary, folder))

    @property
    def tokens(self) -> int:
        """Read by a system in its training, and in the search for its learning rate."""
        return self.batch_size * self.length * (self.steps + len(self.rates) * self.search_steps)

    @property
    def digest(self) -> str:
        """A short name for all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    def seconds(self, system: str, parameters: str) -> float:
        """Processor seconds for the training of a system and the search for its rate, for the plan."""
        runs = len(self.rates) + 1
        tokens = self.tokens + FORWARD * runs * self.validation
        return CELL_SECONDS + runs * RUN_SECONDS + tokens / speed(system, parameters)


# Shows in minutes that a table can be made; its models are too small and too short of training to compare.
QUICK = Recipe(
    "shakespeare", ("100k",), steps=100, search_steps=30, batch_size=8, length=128, validation=8192
)
# Enough seeds for a verdict on every claim in some hours; models of a million parameters that are trained
# short of what they could learn.
MEDIUM = Recipe(search_steps=40, batch_size=8, validation=16384)


@dataclass(frozen=True)
class Variant:
    """A system under a label.

    changes: fields of its configuration that differ. reader: makes what reads with the trained model, where
    that is not the system's own reader.
    """

    label: str
    system: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    reader: Callable[[Any], Reader] | None = None

    @property
    def folder(self) -> str:
        """Of its training, which variants share that differ in their reader alone."""
        return (self.label if self.changes else self.system).replace(" ", "-")


def variants(*names: str) -> tuple[Variant, ...]:
    """Systems with their defaults."""
    return tuple(Variant(name, name) for name in names)


@dataclass(frozen=True)
class Trained:
    """A trained system, its reader, the tokenizer it reads through, and the numbers of its training."""

    model: PreTrainedModel
    reader: Reader
    numbers: Numbers
    tokenizer: str = TrainSettings.tokenizer


def trained(
    variant: Variant, parameters: str, seed: int, recipe: Recipe, work: Path, progress: Progress
) -> Trained | None:
    """Train a system by the recipe, or load what an earlier call has trained; None if every rate diverges.

    Args:
        work: a folder for trained models.
    """
    folder = work / f"{variant.folder}-{parameters}-seed-{seed}"
    about, tokenizer = folder / "about.json", recipe.tokenizer(work)
    how = json.loads(json.dumps([recipe.__dict__ | {"facts": vars(recipe.facts)}, dict(variant.changes)]))
    if about.is_file() and (kept := json.loads(about.read_text(encoding="utf-8")))["recipe"] == how:
        return _loaded(variant, folder / "model", kept["numbers"], tokenizer)
    shutil.rmtree(folder, ignore_errors=True)
    common = TrainSettings(
        data=recipe.data,
        model=variant.system,
        parameters=parameters,
        config=dict(variant.changes),
        tokenizer=tokenizer,
        batch_size=recipe.batch_size,
        sequence_length=recipe.length,
        facts=recipe.facts,
        eval_every=10**9,
        save_every=10**9,
        eval_tokens=recipe.validation,
        seed=seed,
        threads=1,
    )
    whole, began = recipe.steps + len(recipe.rates) * recipe.search_steps, time.process_time()
    found: dict[float, float] = {}
    for number, rate in enumerate(recipe.rates):
        # One line of metrics: a curve would take longer to draw than these steps take.
        settings = replace(
            common,
            output=folder / f"rate-{rate}",
            steps=recipe.search_steps,
            log_every=recipe.search_steps,
            learning_rate=rate,
        )
        done = number * recipe.search_steps
        loss = _validation(settings, lambda step, done=done: progress(done + step, whole))
        shutil.rmtree(settings.output, ignore_errors=True)
        if loss is not None:
            found[rate] = loss
    if not found:
        return None
    best = min(found, key=found.__getitem__)
    settings = replace(common, output=folder / "model", steps=recipe.steps, learning_rate=best)
    done = whole - recipe.steps
    validation = _validation(settings, lambda step: progress(done + step, whole))
    if validation is None:
        return None
    for checkpoint in checkpoints(settings.output):
        shutil.rmtree(checkpoint)
    numbers: Numbers = {
        "rate": best,
        "tried": [[rate, loss] for rate, loss in found.items()],
        "validation": validation,
        "tokens": recipe.steps * recipe.batch_size * recipe.length,
        "training_seconds": time.process_time() - began,
    }
    made = _loaded(variant, folder / "model", numbers, tokenizer)
    numbers["parameters"] = sum(p.numel() for p in made.model.parameters())
    write_json(about, {"recipe": how, "numbers": numbers})
    return made


def _validation(settings: TrainSettings, progress: Any) -> float | None:
    """Train; bits per byte of the validation documents, or None where the loss was not finite."""
    try:
        return TrainingRun(settings).run(lambda line: progress(line["step"])).bits_per_byte
    except NonFiniteError:
        return None


def _loaded(variant: Variant, folder: Path, numbers: Numbers, tokenizer: str) -> Trained:
    model = load_system(variant.system, folder)
    return Trained(model, (variant.reader or SYSTEMS[variant.system].reader)(model), numbers, tokenizer)
