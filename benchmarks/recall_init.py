"""What makes recall be learned at all? How a memory begins, how it is combined with attention, and what the
loss counts, one thing at a time.

    python benchmarks/recall_init.py                  # what is missing, then the table
    python benchmarks/recall_init.py --worker 0/2     # every second run

A run trains the tiny preset on Shakespeare with facts in it, 16 rows of 256 bytes a step, and asks after
every 50 steps for the facts of held-out text, teacher-forced, at the distances of training and far beyond.
Each finished run is kept in benchmarks/results/recall_init.json and not repeated.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from kept import known
from torch import Tensor

from titans.data import hold_out, load_corpus
from titans.data.needles import state_facts
from titans.hf import TitansConfig, TitansForCausalLM
from titans.nn import NeuralMemory
from titans.train.optimizer import make_optimizer

RESULTS = Path(__file__).parent / "results"
STEPS, EVERY, ROWS, LENGTH = 300, 50, 16, 256
SPACING, DISTANCE = 40.0, 48
LEARNING_RATE, WARMUP = 5e-3, 30
# Variant, how it begins, how attention and memory are combined, and how much answers count.
ARMS = (
    *(
        ("lmm", beginning, "–", weight)
        for beginning in ("random", "filters", "induction")
        for weight in (1.0, 10.0)
    ),
    ("lmm", "induction, 15 bytes", "–", 10.0),
    *(("mag", "induction", combination, 10.0) for combination in ("gate", "sum")),
    ("mac", "induction", "gate", 10.0),
    # The memory alone begins so; attention and recall at random.
    ("mac", "memory alone", "sum", 10.0),
    ("mac", "induction", "sum", 10.0),
)
SEEDS = (0, 1)
TESTS = {"near": (512, 150.0, 128), "far": (2048, 150.0, 1024)}
Batch = tuple[Tensor, Tensor]


class Run(NamedTuple):
    variant: str
    beginning: str
    combination: str
    weight: float
    seed: int

    @property
    def name(self) -> str:
        return f"{', '.join(self[:3])}, answers × {self.weight:g}, seed {self.seed}"


def build(run: Run) -> TitansForCausalLM:
    torch.manual_seed(run.seed)
    config = TitansConfig.from_preset(
        "tiny",
        variant=run.variant,
        initializer_range=0.1,
        memory_induction_init=run.beginning != "random",
        memory_combination="sum" if run.combination == "sum" else "gate",
        conv_kernel=16 if "15 bytes" in run.beginning else 4,
    )
    model = TitansForCausalLM(config)
    if run.beginning == "memory alone":
        for mixer in (layer.mixer for layer in model.model.layers):
            for projection in (mixer.attention.key_value, mixer.recall_query):
                torch.nn.init.normal_(projection.weight, std=config.initializer_range)
            mixer.recall_conv.reset_parameters()
    if run.beginning == "filters":
        for memory in model.modules():
            if isinstance(memory, NeuralMemory):
                with torch.no_grad():
                    memory.input.weight.chunk(4)[1].normal_(std=config.initializer_range)
    return model


def batch(text: bytes, generator: np.random.Generator, rows: int, length: int, *facts: float) -> Batch:
    """Ids (rows, length + 1), and which of them are answers."""
    ids, asked = np.empty((rows, length + 1), np.int64), np.zeros((rows, length + 1), bool)
    for row, marks in zip(ids, asked, strict=True):
        at = int(generator.integers(len(text) - length))
        told, answers, _ = state_facts(text[at : at + length], generator, facts[0], farthest=int(facts[1]))
        told += text[at + length : at + 2 * length]
        row[:] = np.frombuffer(told[: length + 1], np.uint8)
        for begin, end in answers:
            marks[begin:end] = True
    return torch.from_numpy(ids), torch.from_numpy(asked)


def measure(model: TitansForCausalLM, ids: Tensor, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bits and hits of every prediction, and which are of answers."""
    logits = model(ids[:, :-1], use_cache=False).logits
    nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return nats / math.log(2), logits.argmax(-1) == ids[:, 1:], asked[:, 1:]


def train(run: Run, texts: tuple[bytes, bytes], tests: dict[str, Batch]) -> dict[str, Any]:
    model, generator = build(run), np.random.default_rng(run.seed)
    optimizer = make_optimizer(model, LEARNING_RATE, 0.1, (0.9, 0.95))
    curve, began = [], time.perf_counter()
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP)
        bits, _, asked = measure(model, *batch(texts[0], generator, ROWS, LENGTH, SPACING, DISTANCE))
        weights = torch.where(asked, run.weight, 1.0)
        ((bits * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            point: dict[str, Any] = {"step": step}
            for name, test in tests.items():
                with torch.no_grad():
                    bits, right, asked = measure(model, *test)
                point[name] = right[asked].float().mean().item()
                point[f"{name} text"] = bits[~asked].mean().item()
            curve.append(point)
            print(
                f"{run.name}: step {step}/{STEPS}, answers {point['near']:.0%}, far {point['far']:.0%}, "
                f"{step * ROWS * LENGTH / (time.perf_counter() - began):,.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
    return {"run": run.name, "curve": curve, "seconds": time.perf_counter() - began}


def table(found: dict[str, dict[str, Any]]) -> str:
    head = ["variant", "beginning", "combination", "answers count", "seeds"]
    head += [*(f"step {s}" for s in (100, 200, 300)), "far", "text"]
    lines = [head, ["---"] * len(head)]
    for arm in ARMS:
        curves = [found[name]["curve"] for seed in SEEDS if (name := Run(*arm, seed).name) in found]
        if not curves:
            continue

        def each(index: int, key: str, curves: list[Any] = curves) -> str:
            return ", ".join(f"{100 * curve[index][key]:.0f}" for curve in curves)

        variant, beginning, combination, weight = arm
        cells = [variant, beginning, combination, f"× {weight:g}", str(len(curves))]
        cells += [*(each(i, "near") for i in (1, 3, 5)), each(5, "far")]
        lines.append([*cells, f"{statistics.mean(c[5]['near text'] for c in curves):.3f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(found: dict[str, dict[str, Any]]) -> None:
    """Write the table of what is there."""
    about = (
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}; `python benchmarks/recall_init.py`. Tiny preset, {STEPS} steps of "
        f"{ROWS} × {LENGTH} bytes, a fact in every {SPACING:.0f} bytes, asked for within {DISTANCE}; % of "
        "held-out answer bytes right, each seed, near (within 128 bytes) after steps 100, 200 and 300, and "
        "far (within 1,024) at the end; bits per byte of all else."
    )
    (RESULTS / "recall_init.md").write_text(f"{about}\n\n{table(found)}\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", default="0/1", help="which part of the runs, such as 0/2")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.worker.split("/"))
    torch.set_num_threads(1)
    kept = RESULTS / "recall_init.json"
    train_documents, held_out = hold_out(load_corpus("shakespeare"))
    texts = tuple(b"\n".join(d.data for d in part) for part in (train_documents, held_out))
    tests = {
        name: batch(texts[1], np.random.default_rng(5), 8, length, *facts)
        for name, (length, *facts) in TESTS.items()
    }
    runs = [Run(*arm, seed) for seed in SEEDS for arm in ARMS]
    for number, run in enumerate(runs):
        with known(kept) as found:
            done = run.name in found
        if number % parts == part and not done:
            result = train(run, texts, tests)
            with known(kept) as found:
                found[run.name] = result
        report(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
