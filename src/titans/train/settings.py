"""Everything that decides a training run, as one value."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

ENGINES = ("ddp", "fsdp")
DTYPES = ("float32", "tfloat32", "bfloat16")
SETTINGS_FILE = "training.json"
# A checkpoint continues a run only where these agree; the others change neither the data nor the model.
_FIXED = (
    "data", "model", "parameters", "preset", "variant", "config", "tokenizer", "hold_out", "batch_size",
    "sequence_length", "carry_memory", "in_order", "seed", "facts", "start_from",
)  # fmt: skip
# Flat names of before the facts had settings of their own.
_FACTS_WERE = {"fact_spacing": "spacing", "fact_distance": "distance", "facts_alike": "alike"} | {
    name: name for name in ("answer_weight", "refrains", "numbered_lines", "write_cost", "write_cost_reach")
}


@dataclass(frozen=True)
class FactSettings:
    """Facts in the training text, and what the loss counts, so that a memory learns to recall."""

    spacing: float | None = None
    """State facts in the training text, one in so many bytes, and ask for them again; by default none."""
    distance: int = 256
    """Most bytes of text from a fact to where it is asked for."""
    alike: float = 0.0
    """Share of the facts about a name that are followed by one to four others in the same words."""
    answer_weight: float = 1.0
    """How much a byte of an answer about a fact counts in the loss; other bytes count 1."""
    refrains: float = 0.0
    """Share of the training text in which a few sentences are repeated again and again."""
    numbered_lines: float = 0.0
    """Share of the training text that lies in stretches whose lines are numbered."""
    write_cost: float = 0.0
    """What the slower half of a memory's heads pay for writing, see `titans.train.write_cost`."""
    write_cost_reach: float = 8.0
    """How small a write still pays: down to e to minus this of the largest step."""


@dataclass(frozen=True)
class TrainSettings:
    """What to train, on what, and how; `training.json` in every model's folder holds it."""

    data: str | tuple[str, ...]
    """Corpus: a text file, a folder of them, hf:NAME, or a built-in name: excerpt, shakespeare, bible.
    Several are mixed, with weights as in books=0.3; these and hf:NAME are streamed."""
    output: Path = Path("run")
    """Folder of the run: model, tokenizer, checkpoints, metrics.jsonl, curves.png."""
    model: str | None = None
    """A system to compare with, in place of preset and variant: a name in `titans.baselines.systems`, such as
    transformer, mamba2, gated-deltanet or lmm."""
    parameters: str = "1M"
    """Size of that system, to 2 %: such as 350k, 1M or 16M."""
    preset: str = "tiny"
    """Size of the model: tiny, small, 170m, 340m, 760m, 1.3b."""
    variant: str = "mac"
    """mac, mag, mal, lmm, or without a memory transformer, or window, whose attention sees a window."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of TitansConfig that differ from the preset."""
    tokenizer: str = "bytes"
    """bytes, or the folder or name of a Hugging Face tokenizer."""
    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 16
    """Rows in a step, of all processes together."""
    sequence_length: int = 256
    """Tokens in a row."""
    carry_memory: bool = False
    """Consecutive steps read consecutive segments of a document, and the memory is carried over."""
    in_order: bool = False
    """Rows read their documents in order, as when the memory is carried, but every row with a fresh state."""
    facts: FactSettings = field(default_factory=FactSettings)
    """Facts in the training text, for a memory that recalls them."""
    start_from: Path | None = None
    """Folder of a model whose weights to begin with: of the same shapes; chunk sizes may be others."""
    learning_rate: float | None = None
    """Peak learning rate; by default the preset's."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; by default a tenth of all, at most 2000."""
    min_learning_rate: float = 0.1
    """Where the cosine ends, as a fraction of the peak."""
    weight_decay: float = 0.1
    """Weight decay of the projections; norms, biases, embeddings and initial memories have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's two averaging constants."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are shortened to it."""
    eval_data: str | None = None
    """Corpus to evaluate on, instead of documents held out of `data`."""
    hold_out: float = 0.1
    """Fraction of the documents kept for evaluation, whole ones, at least one; 0 for no evaluation."""
    eval_every: int = 100
    """Steps from one evaluation to the next; the last step is always evaluated."""
    eval_tokens: int = 65536
    """An evaluation reads at most about this many tokens, in windows spread evenly over the held-out text."""
    save_every: int = 100
    """Steps from one checkpoint to the next; the last step is always saved, the two newest are kept."""
    log_every: int = 10
    """Steps from one line of metrics.jsonl to the next."""
    seed: int = 0
    """Seed of the initial weights and the order of the examples."""
    dtype: str = "float32"
    """float32; tfloat32, whose products on a GPU have ten bits; or bfloat16: mixed precision, parameters and
    memory in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    cuda_graph: bool = False
    """Record the step on a CUDA device and replay it: faster for small models. Padding is read like text."""
    parallel: str = "ddp"
    """With several processes (torchrun, accelerate launch): ddp, where each has the whole model; or fsdp,
    where each has a part of the weights, gradients and optimizer state."""
    threads: int | None = None
    """CPU threads; by default PyTorch's choice."""
    resume: bool = False
    """Continue from the last checkpoint in the output folder, exactly as if there had been no break; options
    that are not given are those of the run."""

    def check(self) -> None:
        """Find what can be found wrong without reading data.

        Raises:
            ValueError: naming the field, its value and the remedy.
        """
        values = dotted({**vars(self), "facts": vars(self.facts)})
        for name, value in values.items():
            check_type(name, value)
        least = {"steps": 1, "batch_size": 1, "sequence_length": 1, "eval_every": 1, "eval_tokens": 1,
                 "save_every": 1, "log_every": 1, "seed": 0, "warmup_steps": 0, "threads": 1,
                 "facts.distance": 32, "facts.spacing": 1}  # fmt: skip
        for name, bound in least.items():
            if values[name] is not None and values[name] < bound:
                raise ValueError(f"{name}={values[name]!r}: give a whole number of at least {bound}")
        most = {"learning_rate": math.inf, "min_learning_rate": 1, "weight_decay": math.inf,
                "max_grad_norm": math.inf, "hold_out": 1, "facts.alike": 1, "facts.answer_weight": math.inf,
                "facts.refrains": 0.9, "facts.numbered_lines": 0.9, "facts.write_cost": math.inf,
                "facts.write_cost_reach": math.inf}  # fmt: skip
        for name, bound in most.items():
            if values[name] is not None and not 0 <= values[name] <= bound:
                raise ValueError(f"{name}={values[name]!r}: give a number from 0 to {bound}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas!r}: give two numbers in [0, 1)")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: choose one of {list(DTYPES)}")
        if self.hold_out == 1:
            raise ValueError("hold_out=1 leaves nothing to train on: give a fraction below 1")
        if self.carry_memory and self.model is None and not _has_memory(self.variant):
            raise ValueError(
                f"carry_memory with variant={self.variant!r}: it has no memory; choose mac, mag, mal or lmm"
            )
        if self.facts.answer_weight != 1 and self.tokenizer != "bytes":
            raise ValueError(
                f"facts.answer_weight={self.facts.answer_weight} with tokenizer={self.tokenizer!r}: only of "
                "bytes is it known which are answers; use tokenizer='bytes'"
            )
        if self.parallel not in ENGINES:
            raise ValueError(f"parallel={self.parallel!r}: choose one of {list(ENGINES)}")
        if self.cuda_graph and self.dtype == "bfloat16":
            raise ValueError("cuda_graph with dtype='bfloat16': choose 'float32' or 'tfloat32'")

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        # Not at the top: see `_has_memory`.
        from titans.hf import TitansConfig

        values = dataclasses.asdict(self)
        # Written down, so that a run goes on unchanged when the library's default changes.
        if self.model is None:
            values["config"] = {"memory_depth": TitansConfig.memory_depth, **self.config}
        return {name: _plain(value) for name, value in values.items()}

    def check_resumes(self, folder: Path) -> None:
        """Whether the checkpoint in `folder` belongs to the same data and the same model.

        Raises:
            ValueError: naming the first field that differs, or if the settings file is damaged.
        """
        try:
            saved = json.loads((folder / SETTINGS_FILE).read_text())
            # A run from before a setting existed had its default.
            theirs = dotted(TrainSettings(data="").to_json()) | dotted(of_a_run(saved))
        except (TypeError, AttributeError, json.JSONDecodeError):
            raise ValueError(
                f"{folder / SETTINGS_FILE} is damaged: delete the checkpoint to use an older one"
            ) from None
        for name, ours in dotted(self.to_json()).items():
            if name.partition(".")[0] in _FIXED and theirs[name] != ours:
                raise ValueError(
                    f"{name}={ours!r}, but {folder} was trained with {name}={theirs[name]!r}: resume with "
                    "the same value, or start another run in another output folder"
                )


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def current_form(saved: dict[str, Any]) -> dict[str, Any]:
    """Settings that `TrainSettings.to_json` wrote, now or when all of them were flat, by their names of now.

    Raises:
        ValueError: for a setting that no run can have any more.
    """
    # Not at the top: see `_has_memory`.
    from titans.hf.flat_config import nested

    if saved.get("state_passing"):
        raise ValueError(
            f"state_passing={saved['state_passing']}: no row begins with the memory of another any more; "
            "start a new run"
        )
    facts = {new: saved[old] for old, new in _FACTS_WERE.items() if old in saved}
    values = {name: saved[name] for name in saved if name not in (*_FACTS_WERE, "state_passing")}
    if facts and isinstance(values.get("facts", {}), dict):
        values["facts"] = values.get("facts", {}) | facts
    if isinstance(values.get("config"), dict):
        values["config"] = nested(values["config"])
    return values


def of_a_run(saved: dict[str, Any]) -> dict[str, Any]:
    """Settings as `current_form` has them, of a run whose memory had the default depth of its time.

    Raises:
        ValueError: for a setting that no run can have any more.
    """
    values = current_form(saved)
    if isinstance(config := values.get("config", {}), dict) and values.get("model") is None:
        # The depth has been written down since the default changed.
        values["config"] = {"memory_depth": 2, **config}
    return values


def dotted(values: dict[str, Any]) -> dict[str, Any]:
    """Settings by name, those of the facts as facts.NAME."""
    flat = {name: value for name, value in values.items() if name != "facts"}
    return flat | {f"facts.{name}": value for name, value in values.get("facts", {}).items()}


@cache
def field_types() -> dict[str, tuple[type, ...]]:
    """Every setting's name, as `dotted` has them, and the types it may have."""
    hints = get_type_hints(TrainSettings)
    del hints["facts"]
    hints |= {f"facts.{name}": hint for name, hint in get_type_hints(FactSettings).items()}
    return {
        name: tuple(
            get_origin(option) or option
            for option in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))
        )
        for name, hint in hints.items()
    }


def check_type(name: str, value: Any) -> None:
    """Whether a value has a type that the field may have.

    Raises:
        ValueError: naming field, value and types.
    """
    allowed = field_types()[name]
    # A whole number is a number; True is not.
    fits = type(value) in allowed or (isinstance(value, Path) and Path in allowed)
    if not fits and not (type(value) is int and float in allowed):
        names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in allowed)
        raise ValueError(f"{name}={value!r} is of type {type(value).__name__}: give {names}")


def _has_memory(variant: str) -> bool:
    # Not at the top: a command that only parses its arguments does not wait for torch.
    from titans.nn.blocks import has_memory

    return has_memory(variant)
