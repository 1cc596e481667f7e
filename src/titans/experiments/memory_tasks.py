"""The tasks of `memory-forms`: one function for each, which measures one arm with one seed."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.data import byte_tokenizer, hold_out, load_corpus
from titans.data.mad import TASKS as MAD
from titans.data.recall import IGNORED, NUM_VALUES, associative_recall
from titans.evaluate.needle import needle_table
from titans.experiments import forms, synthetic
from titans.experiments.memory_arms import CHUNK_SIZE, HEADS, Arm
from titans.experiments.results import Numbers
from titans.experiments.runner import Progress
from titans.experiments.trained import haystack
from titans.hf import TitansConfig, TitansForCausalLM
from titans.memory import MemoryState, memory_read, memory_scan
from titans.nn import NeuralMemory
from titans.train import FactSettings, TrainingRun, TrainSettings
from titans.train.optimizer import make_optimizer, make_schedule

QUICK_STEPS = 2
TOKENS_PER_STEP = 4096
# One layer of memory, and hardly anything else.
SIZES: dict[str, Any] = dict(
    variant="lmm",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_persistent_tokens=0,
    initializer_range=0.1,
)
# Pairs → steps, in this order. Few pairs at first, because many alone are not learned.
CURRICULUM = {32: 80, 64: 40, 128: 40, 256: 40, 512: 40}
PAIRS, TESTED_QUERIES = tuple(CURRICULUM), 8192
COSINES, WRITTEN_PAIRS = (1.0, 0.9, 0.8), (32, 128)
STEP_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
TEXT_STEPS, TEXT_PARAMETERS = 100, 110_000
MAD_STEPS, MAD_TESTS = 200, 640
RECALL_TASKS, RECALL_LENGTHS, RECALL_SAMPLES = ("number", "word", "passkey"), (512, 2048, 8192), 40
Batch = tuple[Tensor, Tensor]
# Logits for so many labels of each row.
Predict = Callable[[Tensor, int], Tensor]


class Configured(Protocol):
    """A memory that a model can have."""

    def config(self, start: str) -> dict[str, Any]:
        """Fields of `TitansConfig`, for a start of the keys."""
        ...


def pairs(arm: Configured, seed: int, quick: bool, progress: Progress) -> Numbers:
    """Associative recall, first of 32 pairs and then of twice as many up to 512; the share that is right."""
    stages = dict.fromkeys(PAIRS, QUICK_STEPS) if quick else CURRICULUM
    keys = PAIRS[-1]
    sizes: dict[str, Any] = {**SIZES, "vocab_size": keys + NUM_VALUES, **arm.config("sharp")}
    config = TitansConfig(**sizes)
    model, generator = TitansForCausalLM(config), np.random.default_rng(seed)

    def draw(generator: np.random.Generator, rows: int, count: int) -> Batch:
        """Of the labels only those that are scored, (rows, count)."""
        ids, labels = associative_recall(generator, rows, count, count, keys)
        return ids, labels[:, 2 * count :: 2]

    def predict(ids: Tensor, count: int) -> Tensor:
        asked = torch.arange(2 * count, 4 * count, 2)
        return model(ids, use_cache=False, logits_to_keep=asked).logits

    batches = (
        draw(generator, TOKENS_PER_STEP // (4 * count), count)
        for count, steps in stages.items()
        for _ in range(steps)
    )
    found = fit(model, predict, batches, sum(stages.values()), 3e-3, progress)
    for count in PAIRS:
        rows = 2 if quick else TESTED_QUERIES // count
        found[str(count)] = accuracy(predict, *draw(np.random.default_rng(10_000 + count), rows, count))
    return found


def text(arm: Configured, start: str, seed: int, quick: bool, progress: Progress) -> Numbers:
    """Held-out bits per byte, of windows of 256 bytes and of one stream, at equal parameters.

    The width of the MLP is the largest with which the model has at most `TEXT_PARAMETERS`.
    """
    sizes: dict[str, Any] = {**SIZES, "vocab_size": 256, **arm.config(start)}
    del sizes["intermediate_size"]
    small, more = (
        count_parameters(TitansForCausalLM(TitansConfig(**sizes, intermediate_size=width)))
        for width in (8, 16)
    )
    sizes["intermediate_size"] = 8 + 8 * (TEXT_PARAMETERS - small) // (more - small)
    torch.manual_seed(seed)
    model, steps = TitansForCausalLM(TitansConfig(**sizes)), QUICK_STEPS if quick else TEXT_STEPS
    documents = hold_out(load_corpus("excerpt"))[0]
    written = np.concatenate([np.frombuffer(document.data, np.uint8) for document in documents])
    generator = np.random.default_rng(seed)

    def batches() -> Iterator[Batch]:
        for _ in range(steps):
            rows = TOKENS_PER_STEP // forms.LENGTH
            yield forms.windows(written, generator.integers(len(written) - forms.LENGTH, size=rows))

    found = fit(model, predictions(model), batches(), steps, 1e-2, progress)
    return found | forms.evaluate(model, "text")


def mad(arm: Arm, task: str, seed: int, quick: bool, progress: Progress) -> Numbers:
    """The share of a MAD task's labels that is right, by the two layers of `synthetic`, trained shortly."""
    steps = QUICK_STEPS if quick else MAD_STEPS
    learned = synthetic.Learned(task, "lmm", steps, 32, 2e-3, config=arm.config("sharp"))
    learner, generator = synthetic.Learner(learned), np.random.default_rng(seed)
    batches = (MAD[task].make(generator, learned.batch) for _ in range(steps))
    found = fit(learner, learner, batches, steps, learned.learning_rate, progress)
    test = MAD[task].make(np.random.default_rng(10_000), 32 if quick else MAD_TESTS)
    return found | {"right": accuracy(learner, *test)}


def recall(arm: Arm, seed: int, quick: bool, progress: Progress, folder: Path) -> Numbers:
    """Needles after a short recipe: [exact answers, texts] for each task and length.

    The recipe is the first two stages of `titans.experiments.recipe`, shortened: facts in every line, then
    fewer of them, asked for within 1,024 bytes.
    """
    shutil.rmtree(folder, ignore_errors=True)
    config = arm.config("induction", "recall")
    config["memory"] |= {"conv_kernel": 16, "half_lives": [1024.0, 1e9]}
    dense = TrainSettings(
        data="excerpt",
        output=folder / "dense",
        variant="lmm",
        config={**config, "num_hidden_layers": 2, "initializer_range": 0.1},
        steps=QUICK_STEPS if quick else 120,
        batch_size=8,
        sequence_length=512,
        facts=FactSettings(spacing=60.0, distance=48, answer_weight=10.0),
        learning_rate=5e-3,
        min_learning_rate=0.8,
        eval_every=1000,
        save_every=1000,
        eval_tokens=8192,
        seed=seed,
        threads=1,
    )
    near = replace(
        dense,
        output=folder / "near",
        start_from=dense.output,
        steps=QUICK_STEPS if quick else 80,
        sequence_length=1024,
        facts=replace(dense.facts, spacing=400.0, distance=1024, alike=0.5),
        learning_rate=4e-3,
        min_learning_rate=0.1,
    )
    began, done = time.process_time(), 0
    steps = dense.steps + near.steps
    for stage in (dense, near):
        TrainingRun(stage).run(lambda line, done=done: progress(done + line["step"], steps))
        done += stage.steps
    model = TitansForCausalLM.from_pretrained(near.output).eval()
    found: Numbers = {"parameters": count_parameters(model), "seconds": time.process_time() - began}
    for task in RECALL_TASKS:
        for length in RECALL_LENGTHS[: 1 if quick else None]:
            samples = 1 if quick else min(RECALL_SAMPLES, 5 * 2**16 // length) // 5
            cells = needle_table(
                model,
                byte_tokenizer(),
                task,
                [length],
                (0.0, 0.25, 0.5, 0.75, 0.9),
                haystack=haystack(),
                samples=samples,
                batch_size=samples,
            )
            found[f"{task} {length}"] = [sum(c.correct for c in cells), sum(c.samples for c in cells)]
    return found


def fit(
    model: nn.Module,
    predict: Predict,
    batches: Iterable[Batch],
    steps: int,
    learning_rate: float,
    progress: Progress,
) -> Numbers:
    """Train on batches of (ids, labels); how many parameters, and the processor's seconds.

    Raises:
        RuntimeError: for a gradient that is not finite.
    """
    optimizer = make_optimizer(model, learning_rate, 0.1, (0.9, 0.98))
    schedule = make_schedule(optimizer, steps, steps // 10, 0.05)
    began = time.process_time()
    for step, (ids, labels) in enumerate(batches, 1):
        logits = predict(ids, labels.shape[1])
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step, steps)
    return {"parameters": count_parameters(model), "seconds": time.process_time() - began}


def predictions(model: TitansForCausalLM) -> Predict:
    return lambda ids, count: model(ids, use_cache=False).logits


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def accuracy(predict: Predict, ids: Tensor, labels: Tensor) -> float:
    """The share of the labels that is predicted."""
    right = asked = 0
    rows = max(2 * TOKENS_PER_STEP // ids.shape[1], 1)
    for some, wanted in zip(ids.split(rows), labels.split(rows), strict=True):
        mask, found = wanted != IGNORED, predict(some, wanted.shape[1]).argmax(-1)
        right, asked = right + int((found == wanted)[mask].sum()), asked + int(mask.sum())
    return right / asked


@torch.no_grad()
def robustness(arm: Arm, seed: int, quick: bool) -> Numbers:
    """Pairs written once and read with queries of some cosine with their keys, nothing being trained.

    Keys are random unit vectors, values one of 64 normal vectors; the share of the reads whose nearest of
    these is the right one, at the best of some step sizes, each a factor of the largest that is allowed.
    """
    config = arm.config("random")["memory"]
    memory = NeuralMemory(32, HEADS, arm.head_dim, arm.depth, arm.expansion, CHUNK_SIZE, **config)
    generator, rows = torch.Generator().manual_seed(seed), 1 if quick else 8
    found: Numbers = {}
    for count in WRITTEN_PAIRS:
        shape = (rows, count, HEADS, arm.head_dim)
        keys = F.normalize(torch.randn(shape, generator=generator), dim=-1)
        other = torch.randn(shape, generator=generator)
        across = F.normalize(other - (other * keys).sum(-1, keepdim=True) * keys, dim=-1)
        book = torch.randn(rows, NUM_VALUES, HEADS, arm.head_dim, generator=generator)
        which = torch.randint(NUM_VALUES, (rows, count, HEADS), generator=generator)
        values = book.gather(1, which.unsqueeze(-1).expand(-1, -1, -1, arm.head_dim))
        best = dict.fromkeys(COSINES, 0.0)
        for factor in STEP_FACTORS:
            state = written(memory, keys, values, factor)
            for cosine in COSINES:
                queries = memory.feature_map(cosine * keys + math.sqrt(1 - cosine**2) * across)
                reads = memory_read(memory.inner, queries, state, base=memory.base)
                similar = torch.einsum("bthd,bnhd->bthn", reads, F.normalize(book, dim=-1))
                best[cosine] = max(best[cosine], (similar.argmax(-1) == which).float().mean().item())
        found |= {f"{count} at {cosine}": share for cosine, share in best.items()}
    return found


def written(memory: NeuralMemory, keys: Tensor, values: Tensor, factor: float) -> MemoryState:
    """The memory of rows that have read these pairs, without forgetting or momentum."""
    none = keys.new_zeros(*keys.shape[:3], memory.network.depth)
    # The bound of the gate leaves room for momentum.
    steps = torch.full_like(none, factor * memory.max_step_size / (1 - memory.form.max_momentum))
    mapped, start = memory.feature_map(keys), memory.empty_memory(len(keys))
    problem = (memory.inner, mapped, mapped, values, none, none, steps, start, CHUNK_SIZE)
    return memory_scan(*problem, base=memory.base)[1]
