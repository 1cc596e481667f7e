"""Which memory form, half-lives and schedule? One layer of memory, three tasks, three seeds.

Passkeys in the whole cube of forms × half-lives × schedules; associative recall and text with the fixed
schedule. The cells that the choice depends on most come first.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils import _pytree as pytree

from titans.data import hold_out, load_corpus
from titans.data.recall import IGNORED, associative_recall, passkey, restated_passkey
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request
from titans.experiments.tables import interval, markdown
from titans.hf import TitansConfig, TitansForCausalLM
from titans.nn import NeuralMemory
from titans.train.optimizer import make_optimizer

# See `MemoryForm`; the paper's take the largest step that is stable for a linear memory and one repeated key.
FORMS: dict[str, str | dict[str, Any]] = {
    "camera-ready": "paper",
    "plain": {"name": "paper", "activation": "silu", "residual": False, "norm": False},
    # The library's default.
    "bounded": "stable",
}
# At first, in tokens, log-spaced over the heads from one to the other.
HALF_LIVES = {"short": (64, 64), "long": (1e6, 1e6), "log-spaced": (64, 1e6), "from 1024": (1024, 1e6)}
SCHEDULES = ("fixed", "curriculum", "state passing")
SIZES: dict[str, Any] = dict(
    variant="lmm",
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    head_dim=32,
    memory_depth=2,
    memory_expansion=2,
    num_persistent_tokens=0,
    initializer_range=0.1,
)
LEARNING_RATE, WARMUP_STEPS, SEEDS = 1e-2, 20, 3
TOKENS_PER_STEP, LENGTH = 4096, 256
STEPS = {"passkey": 320, "recall": 800, "text": 80}
QUICK_STEPS = 2
NUM_SAMPLES = 200
COLUMNS = {
    "passkey": ("passkey 512", "passkey 1024", "passkey 4096"),
    "recall": ("recall 32", "recall 256"),
    "text": ("windows", "stream"),
}
Batch = tuple[Tensor, Tensor]


class Trained(NamedTuple):
    """What a cell trains."""

    task: str
    form: str
    half_life: str
    schedule: str

    @property
    def name(self) -> str:
        return ", ".join(self)

    @property
    def distance(self) -> tuple[int, bool]:
        """From the cell that all others are compared with."""
        changed = (self.half_life != "log-spaced") + (self.schedule != "fixed")
        return changed, self.task != "passkey"


def planned() -> list[Trained]:
    cube = map(Trained._make, itertools.product(STEPS, FORMS, HALF_LIVES, SCHEDULES))
    chosen = [t for t in cube if t.task == "passkey" or t.schedule == "fixed"]
    # Half-lives from 1,024 tokens on are the default's.
    chosen = [t for t in chosen if t.half_life != "from 1024" or t[1::2] == ("bounded", "fixed")]
    return sorted(chosen, key=lambda t: t.distance)


class Forms(Experiment):
    """A cell for each combination and seed."""

    name = "forms"
    title = "Which form of the memory, half-lives and schedule"

    def cells(self, request: Request) -> list[Cell]:
        chosen = planned()[:6] if request.quick else planned()
        return [
            Cell(f"{t.name}, seed {seed}", t, seed, cost=STEPS[t.task])
            for t in chosen
            for seed in range(request.seeds or (1 if request.quick else SEEDS))
        ]

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        """A loss that is not finite is a result: the step is recorded as `nan`."""
        trained: Trained = cell.settings
        steps = QUICK_STEPS if request.quick else STEPS[trained.task]
        model, batches = build(trained), Batches(trained, cell.seed)
        optimizer = make_optimizer(model, LEARNING_RATE, 0.01, (0.9, 0.95))
        schedule = LambdaLR(optimizer, partial(learning_rate, steps=steps))
        states, learned, step = None, None, 0
        generator = torch.Generator().manual_seed(cell.seed)
        try:
            for step in range(steps):
                ids, labels = batches.draw(step / steps)
                if trained.schedule == "state passing":
                    # Half of the rows begin with the memory that another row has left.
                    restart = torch.rand(len(ids), generator=generator) < 0.5
                    output = model(ids, memory_states=states, restart=restart, return_memory_states=True)
                    states = pytree.tree_map(lambda x: x.detach().roll(1, 0), output.memory_states)
                else:
                    output = model(ids, use_cache=False)
                optimizer.zero_grad()
                nats(output.logits, labels).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
                optimizer.step()
                schedule.step()
                progress(step + 1, steps)
                if trained.task == "passkey" and learned is None and (step + 1) % 20 == 0:
                    found = answers(model, passkey(np.random.default_rng(54321), 50, 512))[0]
                    learned = step + 1 if found >= 0.9 else None
            measured = evaluate(model, trained.task)
        except (ValueError, RuntimeError) as error:
            if "finite" not in str(error):
                raise
            return {"nan": step}
        return measured | ({"learned": learned} if trained.task == "passkey" else {})

    def table(self, results: Results) -> str:
        about = (
            "One LMM block, width 64, 2 heads of 32, expansion 2, chunk 16; "
            f"{TOKENS_PER_STEP:,} tokens a step, trained at length {LENGTH}, AdamW at {LEARNING_RATE}, "
            "falling in the last third. Mean over seeds ± 95 % interval (Student's t), n = "
            f"{NUM_SAMPLES} samples a seed."
        )
        titles = {
            "passkey": f"Passkey, % exact, after {STEPS['passkey']} steps, at 2, 4 and 16 times their length",
            "recall": f"Associative recall, % of queries, after {STEPS['recall']} steps with 4 … 32 pairs",
            "text": f"Held-out bits per byte after {STEPS['text']} steps: windows, one stream of 16 KiB",
        }
        parts = [about]
        if any("row-normalised" in name for name in results.cells):
            parts.append(
                "Row-normalised: fast weights whose rows had length 1, an option that the library had until "
                "commit 7fa9074."
            )
        for task, title in titles.items():
            parts += [f"## {title}", of_task(task, results)]
        return "\n\n".join(parts)


def of_task(task: str, results: Results) -> str:
    """One task's cells, a row for each combination; forms that are gone come last."""
    kept: dict[tuple[str, ...], list[Numbers]] = {}
    for name, cell in results.cells.items():
        combination = tuple(name.split(", ")[:4])
        if combination[0] == task:
            kept.setdefault(combination[1:], []).append(cell)
    forms = [*FORMS, *sorted({form for form, *_ in kept} - {*FORMS})]
    head = ["form", "half-life", "schedule", "seeds", "NaN", *COLUMNS[task]]
    if task == "passkey":
        head.insert(5, "steps to 90 % at 512")
    rows = []
    for combination in itertools.product(forms, HALF_LIVES, SCHEDULES):
        cells = kept.get(combination)
        if not cells:
            continue
        good = [cell for cell in cells if "nan" not in cell]
        scale, digits = (1, 3) if task == "text" else (100, 1)
        row = [*combination, str(len(cells)), str(len(cells) - len(good))]
        if task == "passkey":
            row.append(", ".join(map(steps_to_learn, cells)))
        rows.append([*row, *(interval([scale * cell[c] for cell in good], digits) for c in COLUMNS[task])])
    return markdown(head, rows)


def steps_to_learn(cell: Numbers) -> str:
    return "NaN" if "nan" in cell else str(cell["learned"] or f"> {STEPS['passkey']}")


def build(trained: Trained) -> TitansForCausalLM:
    model = TitansForCausalLM(TitansConfig.from_preset("tiny", **SIZES, memory={"form": FORMS[trained.form]}))
    for memory in model.modules():
        if isinstance(memory, NeuralMemory):
            memory.set_half_lives(*HALF_LIVES[trained.half_life])
    return model


class Batches:
    """Batches of a task, one after the other."""

    def __init__(self, trained: Trained, seed: int) -> None:
        self.trained, self.generator = trained, np.random.default_rng([seed, 1])
        documents = hold_out(load_corpus("excerpt"))[0]
        self.text = np.concatenate([np.frombuffer(document.data, np.uint8) for document in documents])

    def draw(self, done: float) -> Batch:
        """The next batch, at the part of the training that is over."""
        if self.trained.task == "recall":
            pairs = int(self.generator.integers(4, 33))
            return associative_recall(self.generator, TOKENS_PER_STEP // 128, pairs, 64 - pairs)
        length = LENGTH
        if self.trained.schedule == "curriculum":
            length = LENGTH * (1, 2, 4)[int(3 * done)] // 2
        if self.trained.task == "passkey":
            rows = TOKENS_PER_STEP // length
            return restated_passkey(self.generator, rows, length, longest_gap=length // 2)
        starts = self.generator.integers(len(self.text) - length, size=TOKENS_PER_STEP // length)
        return windows(self.text, starts)


def windows(text: np.ndarray, starts: np.ndarray) -> Batch:
    rows = torch.from_numpy(np.stack([text[s : s + LENGTH + 1] for s in starts]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def nats(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def answers(model: TitansForCausalLM, batch: Batch) -> tuple[float, float]:
    """Parts of the rows answered without a mistake, and of the tokens."""
    right = []
    with torch.no_grad():
        for ids, labels in zip(*(x.split(25) for x in batch), strict=True):
            found = model(ids, use_cache=False).logits.argmax(-1)
            right.append(torch.where(labels == IGNORED, -1, (found == labels).long()))
    table = torch.cat(right)
    return (table != 0).all(1).float().mean().item(), (table[table >= 0] == 1).float().mean().item()


@torch.no_grad()
def evaluate(model: TitansForCausalLM, task: str) -> dict[str, float]:
    """The measurements of a trained model, on samples that are the same for all."""
    generator = np.random.default_rng(12345)
    if task == "passkey":
        return {
            f"passkey {length}": answers(model, passkey(generator, NUM_SAMPLES, length))[0]
            for length in (512, 1024, 4096)
        }
    if task == "recall":
        return {
            f"recall {pairs}": answers(model, associative_recall(generator, NUM_SAMPLES, pairs, 64))[1]
            for pairs in (32, 256)
        }
    (document,) = hold_out(load_corpus("excerpt"))[1]
    text = np.frombuffer(document.data, np.uint8)
    stream = torch.from_numpy(text[:16385].astype(np.int64))[None]
    starts = np.linspace(0, len(text) - LENGTH - 1, NUM_SAMPLES).astype(int)
    batches = {"windows": windows(text, starts), "stream": (stream[:, :-1], stream[:, 1:])}
    return {
        name: nats(model(ids, use_cache=False).logits, labels).item() / math.log(2)
        for name, (ids, labels) in batches.items()
    }


def learning_rate(step: int, steps: int) -> float:
    """Warm-up, a plateau long enough for recall to be found, and a last third that settles."""
    return min((step + 1) / WARMUP_STEPS, 3 * (steps - step) / steps, 1)
