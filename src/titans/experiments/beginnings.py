"""What makes recall be learned at all? How a memory begins, how it is combined with attention, and what the
loss counts, one thing at a time.

The tiny preset is trained on Shakespeare with facts inserted, and asked after every 100 steps for the facts
of held-out text, teacher-forced, at the distances of training and far beyond.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titans.data import hold_out, load_corpus
from titans.data.needles import state_facts
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request
from titans.experiments.tables import markdown
from titans.hf import TitansConfig, TitansForCausalLM
from titans.train.optimizer import make_optimizer

STEPS, QUICK_STEPS, POINTS, ROWS, LENGTH, SEEDS = 300, 3, 3, 16, 256, 2
SPACING, DISTANCE = 40.0, 48
LEARNING_RATE, WARMUP = 5e-3, 30
# Length, bytes between facts, and how far back the farthest is.
TESTS = {"near": (512, 150.0, 128), "far": (2048, 150.0, 1024)}
Batch = tuple[Tensor, Tensor]


class Arm(NamedTuple):
    """beginning: "random", "induction" or "induction, 15 bytes" (keys that see so many). weight: of answers
    in the loss."""

    variant: str
    beginning: str
    combination: str
    weight: float

    @property
    def name(self) -> str:
        return f"{', '.join(self[:3])}, answers × {self.weight:g}"


ARMS = (
    *(Arm("lmm", beginning, "–", weight) for beginning in ("random", "induction") for weight in (1.0, 10.0)),
    Arm("lmm", "induction, 15 bytes", "–", 10.0),
    *(
        Arm(variant, "induction", combination, 10.0)
        for variant in ("mag", "mac")
        for combination in ("gate", "sum")
    ),
)


class Beginnings(Experiment):
    """A cell for each arm and seed."""

    name = "beginnings"
    title = "What makes recall be learned"

    def cells(self, request: Request) -> list[Cell]:
        seeds = request.seeds or (1 if request.quick else SEEDS)
        arms = ARMS[2:4] if request.quick else ARMS
        return [Cell(f"{arm.name}, seed {seed}", arm, seed) for seed in range(seeds) for arm in arms]

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        steps = QUICK_STEPS if request.quick else STEPS
        text, held_out = (
            b"\n".join(document.data for document in documents)
            for documents in hold_out(load_corpus("shakespeare"))
        )
        tests = {
            name: batch(held_out, np.random.default_rng(5), 8, length, *facts)
            for name, (length, *facts) in TESTS.items()
        }
        model, generator = build(cell.settings), np.random.default_rng(cell.seed)
        optimizer = make_optimizer(model, LEARNING_RATE, 0.1, (0.9, 0.95))
        found: dict[str, list[float]] = {"near": [], "far": [], "text": []}
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP)
            bits, _, asked = predictions(model, *batch(text, generator, ROWS, LENGTH, SPACING, DISTANCE))
            weights = torch.where(asked, cell.settings.weight, 1.0)
            ((bits * weights).sum() / weights.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress(step, steps)
            if step % (steps // POINTS) == 0:
                for name, test in tests.items():
                    with torch.no_grad():
                        bits, right, asked = predictions(model, *test)
                    found[name].append(right[asked].float().mean().item())
                    if name == "near":
                        found["text"].append(bits[~asked].mean().item())
        return {**found}

    def table(self, results: Results) -> str:
        rows = []
        # Arms that are no longer measured come last.
        kept: dict[str, list[Numbers]] = {}
        for name, cell in results.cells.items():
            kept.setdefault(name.rpartition(", seed")[0], []).append(cell)
        order = [arm.name for arm in ARMS]
        for name in sorted(kept, key=lambda n: (order.index(n) if n in order else len(order), n)):
            cells = kept[name]

            def each(key: str, index: int, cells: list[Numbers] = cells) -> str:
                return ", ".join(f"{100 * cell[key][index]:.0f}" for cell in cells)

            bits = statistics.mean(cell["text"][-1] for cell in cells)
            rows.append([name, *(each("near", i) for i in range(POINTS)), each("far", -1), f"{bits:.3f}"])
        about = (
            f"Tiny preset, {STEPS} steps of {ROWS} × {LENGTH} bytes, a fact in every {SPACING:.0f} bytes, "
            f"asked for within {DISTANCE}; % of held-out answer bytes right, each seed, near (within 128 "
            "bytes) after steps 100, 200 and 300, and far (within 1,024) at the end; bits per byte of all "
            "else."
        )
        if any("filters" in name for name in kept):
            about += (
                " Filters: the keys' filter lags the queries' by one token, with projections of their own; "
                "no longer measured."
            )
        head = ["variant, beginning, combination, weight of answers", "step 100", "step 200", "step 300"]
        return f"{about}\n\n{markdown([*head, 'far', 'text'], rows)}"


def build(arm: Arm) -> TitansForCausalLM:
    return TitansForCausalLM(
        TitansConfig.from_preset(
            "tiny",
            variant=arm.variant,
            initializer_range=0.1,
            memory_depth=2,
            memory={
                "start": "random" if arm.beginning == "random" else "induction",
                "combination": "sum" if arm.combination == "sum" else "gate",
                "conv_kernel": 16 if "15 bytes" in arm.beginning else 4,
            },
        )
    )


def batch(text: bytes, generator: np.random.Generator, rows: int, length: int, *facts: float) -> Batch:
    """Ids (rows, length + 1), and which of them are answers."""
    ids, asked = np.empty((rows, length + 1), np.int64), np.zeros((rows, length + 1), bool)
    for row, marks in zip(ids, asked, strict=True):
        at = int(generator.integers(len(text) - length))
        stated, answers, _ = state_facts(text[at : at + length], generator, facts[0], farthest=int(facts[1]))
        stated += text[at + length : at + 2 * length]
        row[:] = np.frombuffer(stated[: length + 1], np.uint8)
        for begin, end in answers:
            marks[begin:end] = True
    return torch.from_numpy(ids), torch.from_numpy(asked)


def predictions(model: TitansForCausalLM, ids: Tensor, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bits and hits of every prediction, and which are of answers."""
    logits = model(ids[:, :-1], use_cache=False).logits
    nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return nats / math.log(2), logits.argmax(-1) == ids[:, 1:], asked[:, 1:]
