"""Which memory form, half-lives and schedule? One layer of memory, three tasks, three seeds.

    python benchmarks/memory_forms.py                        # what is missing, then the tables
    python benchmarks/memory_forms.py --worker 0/2 --minutes 20   # every second run, for about 20 minutes

A run is one model: form × half-life × schedule × task × seed; each finished one is kept in
runs/memory_forms and not repeated, nor is one that stands in benchmarks/results/memory_forms.json
already. The tables beside that file hold what is there.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from titans.data import hold_out, load_corpus
from titans.data.recall import IGNORED, associative_recall, passkey, restated_passkey
from titans.hf import TitansConfig, TitansForCausalLM
from titans.nn import NeuralMemory
from titans.train.checkpoint import write_json
from titans.train.optimizer import make_optimizer

LITERAL = dict(
    memory_normalize_step=False,
    memory_row_limit=None,
    memory_length_floor=0.0,
    memory_decay_to_initial=False,
    memory_max_momentum=0.9,
    # The largest step that is stable for a linear memory, unit keys and one repeated key.
    memory_max_step_size=(1 - 0.9) / 16,
)
CAMERA_READY = dict(memory_activation="gelu", memory_residual=True, memory_norm=True)
PLAIN = dict(memory_activation="silu", memory_residual=False, memory_norm=False)
FORMS: dict[str, dict[str, Any]] = {
    "camera-ready": LITERAL | CAMERA_READY,
    "plain": LITERAL | PLAIN,
    "row-normalised": LITERAL
    | CAMERA_READY
    | dict(memory_normalize_step=True, memory_row_limit=1.0, memory_max_step_size=8 * (1 - 0.9) / 16),
    "bounded": PLAIN
    | dict(
        memory_normalize_step=True,
        memory_row_limit=8.0,
        memory_length_floor=1.0,
        memory_decay_to_initial=True,
        memory_max_momentum=0.5,
        memory_max_step_size=2 * (1 - 0.5) / 16,
    ),
}
# At first, in tokens, log-spaced over the heads from one to the other.
HALF_LIVES = {"short": (64, 64), "long": (1e6, 1e6), "log-spaced": (64, 1e6), "from 1024": (1024, 1e6)}
SCHEDULES = ("fixed", "curriculum", "state passing")
SEEDS = (0, 1, 2)
SIZES = dict(
    variant="lmm",
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    head_dim=32,
    memory_expansion=2,
    num_persistent_tokens=0,
    initializer_range=0.1,
)
LEARNING_RATE, WARMUP_STEPS = 1e-2, 20
TOKENS_PER_STEP, LENGTH = 4096, 256
STEPS = {"passkey": 320, "recall": 800, "text": 80}
NUM_SAMPLES = 200
# Results of other settings are not mixed in.
SETTINGS = {
    task: json.loads(json.dumps([FORMS, HALF_LIVES, SIZES, steps, TOKENS_PER_STEP, LENGTH, LEARNING_RATE]))
    for task, steps in STEPS.items()
}
RESULTS = Path(__file__).parent / "results"
Batch = tuple[Tensor, Tensor]


class Run(NamedTuple):
    task: str
    form: str
    half_life: str
    schedule: str
    seed: int

    @property
    def name(self) -> str:
        return "-".join(map(str, self)).replace(" ", "_")


def all_runs() -> list[Run]:
    """Passkeys in the whole cube; recall and text with the fixed schedule. What the choice depends on most
    comes first: the cells next to log-spaced half-lives and the fixed schedule. Half-lives from 1024 tokens
    were thought of later, for the form that is the default."""

    def order(run: Run) -> tuple[int, int, int]:
        beside = (run.half_life != "log-spaced") + (run.schedule != "fixed")
        return (beside, run.task != "passkey", run.seed)

    cube = itertools.product(("passkey", "recall", "text"), FORMS, HALF_LIVES, SCHEDULES, SEEDS)
    runs = [Run(*cell) for cell in cube]
    runs = [r for r in runs if r.task == "passkey" or r.schedule == "fixed"]
    late = [r for r in runs if r.half_life == "from 1024"]
    kept = [r for r in late if r.form == "bounded" and r.schedule == "fixed"]
    return sorted((r for r in runs if r not in late or r in kept), key=order)


def build(run: Run) -> TitansForCausalLM:
    torch.manual_seed(run.seed)
    model = TitansForCausalLM(TitansConfig.from_preset("tiny", **SIZES, **FORMS[run.form]))
    for memory in model.modules():
        if isinstance(memory, NeuralMemory):
            memory.set_half_lives(*HALF_LIVES[run.half_life])
    return model


class Training:
    """Batches of a task, one after the other."""

    def __init__(self, run: Run) -> None:
        self.run, self.generator = run, np.random.default_rng([run.seed, 1])
        self.text = np.concatenate(
            [np.frombuffer(d.data, np.uint8) for d in hold_out(load_corpus("excerpt"))[0]]
        )

    def batch(self, done: float) -> Batch:
        """The next step's rows; `done` is the part of the training that is over."""
        if self.run.task == "recall":
            pairs = int(self.generator.integers(4, 33))
            return associative_recall(self.generator, TOKENS_PER_STEP // 128, pairs, 64 - pairs)
        length = LENGTH
        if self.run.schedule == "curriculum":
            length = LENGTH * (1, 2, 4)[int(3 * done)] // 2
        if self.run.task == "passkey":
            gap = length // 2
            return restated_passkey(self.generator, TOKENS_PER_STEP // length, length, longest_gap=gap)
        return windows(
            self.text, self.generator.integers(len(self.text) - length, size=TOKENS_PER_STEP // length)
        )


def windows(text: np.ndarray, starts: np.ndarray) -> Batch:
    rows = torch.from_numpy(np.stack([text[s : s + LENGTH + 1] for s in starts]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def answers(model: TitansForCausalLM, batch: Batch) -> tuple[float, float]:
    """Parts of the rows answered without a mistake, and of the tokens."""
    right = []
    with torch.no_grad():
        for ids, labels in zip(*(x.split(25) for x in batch), strict=True):
            found = model(ids, use_cache=False).logits.argmax(-1)
            right.append(torch.where(labels == IGNORED, -1, (found == labels).long()))
    table = torch.cat(right)
    return (table != 0).all(1).float().mean().item(), (table[table >= 0] == 1).float().mean().item()


def nats(model: TitansForCausalLM, batch: Batch) -> Tensor:
    logits = model(batch[0], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), ignore_index=IGNORED)


def evaluate(model: TitansForCausalLM, task: str) -> dict[str, float]:
    """The measurements of a trained model, on samples that are the same for all."""
    generator, found = np.random.default_rng(12345), {}
    if task == "passkey":
        for length in (512, 1024, 4096):
            found[f"passkey {length}"], found[f"digits {length}"] = answers(
                model, passkey(generator, NUM_SAMPLES, length)
            )
    elif task == "recall":
        for pairs in (32, 256):
            found[f"recall {pairs}"] = answers(model, associative_recall(generator, NUM_SAMPLES, pairs, 64))[
                1
            ]
    else:
        (document,) = hold_out(load_corpus("excerpt"))[1]
        text = np.frombuffer(document.data, np.uint8)
        starts = np.linspace(0, len(text) - LENGTH - 1, NUM_SAMPLES).astype(int)
        stream = torch.from_numpy(text[:16385].astype(np.int64))[None]
        with torch.no_grad():
            found["windows"] = nats(model, windows(text, starts)).item() / math.log(2)
            found["stream"] = nats(model, (stream[:, :-1], stream[:, 1:])).item() / math.log(2)
    return found


def learning_rate(step: int, steps: int) -> float:
    """Warm-up, a plateau long enough for recall to be found, and a last third that settles."""
    return min((step + 1) / WARMUP_STEPS, 3 * (steps - step) / steps, 1)


def train(run: Run) -> dict[str, Any]:
    """One run. NaN is a result: the step at which it came."""
    model, training, began = build(run), Training(run), time.perf_counter()
    optimizer = make_optimizer(model, LEARNING_RATE, 0.01, (0.9, 0.95))
    steps, states, learned = STEPS[run.task], None, None
    schedule = LambdaLR(optimizer, partial(learning_rate, steps=steps))
    losses: list[float] = []
    generator = torch.Generator().manual_seed(run.seed)
    for step in range(steps):
        ids, labels = training.batch(step / steps)
        try:
            if run.schedule == "state passing":
                # Half of the rows begin with the memory that another row has left.
                restart = torch.rand(len(ids), generator=generator) < 0.5
                output = model(ids, memory_states=states, restart=restart, return_memory_states=True)
                states = torch.utils._pytree.tree_map(lambda x: x.detach().roll(1, 0), output.memory_states)
            else:
                output = model(ids, use_cache=False)
            loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            length = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        except (ValueError, RuntimeError) as error:
            return {"nan": step, "what": str(error)[:200], "seconds": time.perf_counter() - began}
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
        if run.task == "passkey" and learned is None and (step + 1) % 20 == 0:
            found = answers(model, passkey(np.random.default_rng(54321), 50, 512))[0]
            learned = step + 1 if found >= 0.9 else None
    try:
        measured = evaluate(model, run.task)
    except ValueError as error:
        return {"nan": steps, "what": str(error)[:200], "seconds": time.perf_counter() - began}
    return measured | {
        "learned": learned,
        "loss": statistics.mean(losses[-20:]),
        "gradient": length.item(),
        "seconds": time.perf_counter() - began,
    }


def interval(values: list[float], scale: float = 100, digits: int = 1) -> str:
    """Mean over seeds and its 95 % interval, Student's t."""
    if len(values) < 2:
        return f"{scale * values[0]:.{digits}f}" if values else "–"
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}[len(values)]
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return f"{scale * statistics.mean(values):.{digits}f} ± {scale * half:.{digits}f}"


COLUMNS = {
    "passkey": ("passkey 512", "passkey 1024", "passkey 4096"),
    "recall": ("recall 32", "recall 256"),
    "text": ("windows", "stream"),
}


def steps_to_learn(found: dict[str, Any]) -> str:
    return "NaN" if "nan" in found else str(found["learned"] or f"> {STEPS['passkey']}")


def table(task: str, results: dict[Run, dict[str, Any]]) -> str:
    """One task's runs as a Markdown table, a row for each cell."""
    head = ["form", "half-life", "schedule", "seeds", "NaN", *COLUMNS[task]]
    if task == "passkey":
        head.insert(5, "steps to 90 % at 512")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for form, half_life, schedule in itertools.product(FORMS, HALF_LIVES, SCHEDULES):
        cell = [results[r] for r in results if r[:4] == (task, form, half_life, schedule)]
        if not cell:
            continue
        good = [found for found in cell if "nan" not in found]
        scale, digits = (1, 3) if task == "text" else (100, 1)
        row = [form, half_life, schedule, str(len(cell)), str(len(cell) - len(good))]
        if task == "passkey":
            row.append(", ".join(map(steps_to_learn, cell)))
        row += [interval([found[c] for found in good], scale, digits) for c in COLUMNS[task]]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def report(folder: Path) -> str:
    runs = all_runs()
    results = {run: json.loads(p.read_text()) for run in runs if (p := folder / f"{run.name}.json").exists()}
    about = (
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}; "
        f"`python benchmarks/memory_forms.py`; {len(results)} of {len(runs)} runs. One LMM block, width 64, "
        f"2 heads of 32, expansion 2, chunk 16; {TOKENS_PER_STEP:,} tokens a step, "
        f"trained at length {LENGTH}, AdamW at {LEARNING_RATE}, falling in the last third. "
        f"Mean over seeds ± 95 % interval (Student's t), n = {NUM_SAMPLES} samples a seed."
    )
    titles = {
        "passkey": f"Passkey, % exact, after {STEPS['passkey']} steps, at 2, 4 and 16 times their length",
        "recall": f"Associative recall, % of queries, after {STEPS['recall']} steps with 4 … 32 pairs",
        "text": f"Held-out bits per byte after {STEPS['text']} steps: fresh windows, one stream of 16 KiB",
    }
    parts = [about, *(f"### {titles[task]}\n\n{table(task, results)}" for task in titles)]
    RESULTS.mkdir(exist_ok=True)
    kept = {"settings": SETTINGS, "runs": {run.name: found for run, found in results.items()}}
    (RESULTS / "memory_forms.json").write_text(json.dumps(kept, indent=0) + "\n")
    text = "\n\n".join(parts) + "\n"
    (RESULTS / "memory_forms.md").write_text(text)
    return text


def take_up(folder: Path) -> None:
    """Count the runs of the committed results as done."""
    path = RESULTS / "memory_forms.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    for name, found in before.get("runs", {}).items():
        task = name.split("-")[0]
        if before["settings"].get(task) == SETTINGS[task]:
            write_json(folder / f"{name}.json", found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", default="0/1", help="k/n: of all runs those whose number is k modulo n")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many minutes")
    parser.add_argument("--tasks", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--runs", type=Path, default=Path("runs/memory_forms"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    worker, workers = map(int, arguments.worker.split("/"))
    arguments.runs.mkdir(parents=True, exist_ok=True)
    take_up(arguments.runs)
    began = time.monotonic()
    mine = [run for run in all_runs() if run.task in arguments.tasks][worker::workers]
    for number, run in enumerate(mine, start=1):
        kept = arguments.runs / f"{run.name}.json"
        if kept.exists():
            continue
        if time.monotonic() - began > 60 * arguments.minutes:
            break
        found = train(run)
        write_json(kept, found)
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
        print(f"{number}/{len(mine)} {run.name} {shown}", file=sys.stderr, flush=True)
    print(report(arguments.runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
