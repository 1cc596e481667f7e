"""What would a practitioner do instead of a graft? Systems around one pretrained model, on the same texts.

Each system is measured in prediction by position, in recall of facts from haystacks, and with twenty
questions about a play. Settings are chosen on one document, by cells of their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.baselines.continuous_cache import ContinuousCache
from titans.evaluate.ask import is_answer
from titans.experiments import graft_comparison_systems as systems
from titans.experiments.graft_comparison_page import LONG, RANGES, SHORT, page
from titans.experiments.graft_comparison_systems import BASELINES, RETRIEVAL, System, trained_grafts
from titans.experiments.graft_comparison_texts import (
    FACTS,
    HAYSTACKS,
    NEEDLES,
    PLAY_QUESTIONS,
    PLAY_TOKENS,
    SAMPLES,
    WORDINGS,
    contains,
    first_line,
    haystacks,
    play_questions,
)
from titans.experiments.held_out import BOOK, PLAY, documents, tempest
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request

QUICK = 512
# Systems that read at constant cost, or nearly so.
CHEAP = ("window", "cache", "small cache", "adaptation")
# Longest haystacks: for systems with a backward pass, which are asked for one fact; with several facts.
LONGEST_OF_DYNAMIC, LONGEST_OF_SEVERAL = 4096, 16384
# Approximate processor seconds of a system for 1,000 tokens read, and for a question.
COSTS = {
    "window": (4, 2), "full attention": (6, 3), "cache": (5, 2), "small cache": (5, 2), "adaptation": (7, 3),
    "dynamic SGD": (16, 4), "dynamic Adam": (22, 5), "dynamic LoRA": (12, 3), RETRIEVAL: (0, 4),
}  # fmt: skip
_OF_TRAINED = (9, 3)
# Tried on the first tokens of one document: weights and sharpnesses of a cache; rates of dynamic evaluation.
TUNING_TOKENS = {"cache": 8192, "dynamic": 2048}
WEIGHTS, SHARPNESSES = (0.02, 0.05, 0.1, 0.2), (10.0, 20.0, 40.0)
RATES = {"SGD": (1e-3, 3e-3, 1e-2), "Adam": (3e-6, 1e-5, 3e-5), "LoRA": (3e-4, 1e-3, 3e-3)}


class Measured(NamedTuple):
    """What a cell measures. what: "tuning", "prediction", "play questions" or a kind of haystack. where: the
    document, or the setting that is tried. tokens: how many are read; 0 where `what` fixes it."""

    what: str
    where: str
    tokens: int
    system: str

    @property
    def name(self) -> str:
        tokens = f"{self.tokens:,}".replace(",", "") if self.tokens else ""
        return ", ".join(part for part in (self.what, self.where, tokens, self.system) if part)


def planned(request: Request, known: Sequence[str]) -> Iterator[list[Measured]]:
    """Groups in order of importance, for the documents that are known."""
    everyone = [*BASELINES, *trained_grafts(request)]
    readers = [name for name in everyone if name != RETRIEVAL]
    constant = [name for name in readers if name in CHEAP or name not in BASELINES]
    lengths = list(SAMPLES)[:1] if request.quick else list(SAMPLES)

    def questions(kinds: Sequence[str]) -> Iterator[list[Measured]]:
        one = kinds == NEEDLES[:1]
        for length in lengths:
            able = everyone
            if not one or length > LONGEST_OF_DYNAMIC:
                able = [name for name in everyone if not name.startswith("dynamic")]
            if one or length <= LONGEST_OF_SEVERAL:
                yield [Measured(kind, "", length, name) for kind in kinds for name in able]

    yield [
        Measured("tuning", "", 0, "cache"),
        *(Measured("tuning", kind, 0, f"{rate:g}") for kind, rates in RATES.items() for rate in rates),
    ]
    yield [Measured("prediction", PLAY, SHORT, name) for name in readers]
    yield from questions(NEEDLES[:1])
    yield [Measured("prediction", d, SHORT, name) for d in known if d != PLAY for name in readers]
    yield [Measured("play questions", "", 0, name) for name in everyone]
    yield from questions(HAYSTACKS[1:])
    if not request.quick:
        yield [Measured("prediction", document, LONG, name) for document in known for name in constant]


def cost(measured: Measured) -> float:
    """Approximate processor seconds."""
    if measured.what == "tuning":
        kind = "cache" if measured.system == "cache" else "dynamic"
        return (
            TUNING_TOKENS[kind] / 1000 * COSTS["cache" if kind == "cache" else f"dynamic {measured.where}"][0]
        )
    reading, asking = COSTS.get(measured.system, _OF_TRAINED)
    tokens = min(measured.tokens, 8192) if measured.system == "full attention" else measured.tokens
    if measured.what == "prediction":
        return tokens / 1000 * reading
    if measured.what == "play questions":
        return PLAY_TOKENS / 1000 * reading + len(PLAY_QUESTIONS) * asking
    questions = {"one": 3, "two": 4, "four": 8, **dict.fromkeys(WORDINGS, FACTS)}.get(measured.what, 1)
    return SAMPLES[measured.tokens] * (tokens / 1000 * reading + questions * asking)


class GraftComparison(Experiment):
    """A cell for each system, task and text; questions also for each seed."""

    name = "graft-comparison"
    title = "A graft compared with what a practitioner would do instead"
    unit = 1.0

    def cells(self, request: Request) -> list[Cell]:
        found = []
        for group in planned(request, [*documents(request.work)]):
            for seed in range(request.seeds or 1):
                found += [
                    Cell(f"{m.name}, seed {seed}" if m.what in HAYSTACKS else m.name, m, seed, cost(m))
                    for m in group
                    if m.what in HAYSTACKS or not seed
                ]
        return found

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        measured: Measured = cell.settings
        if measured.what == "tuning":
            if measured.system == "cache":
                return tune_cache(request, progress)
            return tune_dynamic(measured.where, float(measured.system), request)
        system = systems.system(measured.system, request)
        texts = documents(request.work)
        if measured.what == "prediction":
            return prediction(system, texts[measured.where](), QUICK if request.quick else measured.tokens)
        if measured.what == "play questions":
            return play(system, texts[PLAY](), QUICK if request.quick else PLAY_TOKENS)
        return recall(system, [text() for text in texts.values()], measured, cell.seed, request, progress)

    def table(self, results: Results) -> str:
        return page(results.cells)


def prediction(system: System, text: str, tokens: int) -> Numbers:
    """Losses by position, processor seconds, and bytes held afterwards."""
    ids = system.encode(text)[:tokens]
    began = time.process_time()
    losses, memory = system.losses(ids)
    seconds = time.process_time() - began
    nats, bits = [], []
    for begin, end in RANGES:
        part = losses[max(begin - 1, 0) : end - 1].double()
        if not len(part):
            break
        num_bytes = len(system.tokenizer.decode(ids[max(begin, 1) : end][: len(part)]).encode())
        nats.append(float(part.mean()))
        bits.append(float(part.sum()) / math.log(2) / num_bytes)
    if not all(map(math.isfinite, nats)):
        return {"diverged": True, "seconds": seconds, "tokens": len(losses) + 1}
    held = {"seconds": seconds, "tokens": len(losses) + 1, "bytes": system.nbytes(memory)}
    return {"nats": nats, "bits": bits, **held}


def recall(
    system: System, texts: list[str], measured: Measured, seed: int, request: Request, progress: Progress
) -> Numbers:
    """Right answers of each task as [right, asked], and processor seconds of reading and answering."""
    right: dict[str, list[int]] = {}
    reading = answering = 0.0
    samples = SAMPLES[measured.tokens]
    for number, asked in enumerate(haystacks(system.tokenizer, texts, measured.what, measured.tokens, seed)):
        began = time.process_time()
        memory = system.remember(asked.ids)
        middle = time.process_time()
        for question in asked.questions:
            steps = len(system.encode(f" {question.answer}")) + 2
            given = system.answer(
                memory,
                question.prompt,
                question.query,
                steps,
                lambda text, a=question.answer: decided(text, a),
            )
            counted = right.setdefault(question.task, [0, 0])
            counted[0] += is_answer(given, question.answer)
            counted[1] += 1
        reading, answering = reading + middle - began, answering + time.process_time() - middle
        progress(number + 1, samples)
        if request.quick:
            break
    return {"right": right, "reading": reading, "answering": answering, "texts": len(texts)}


def decided(text: str, answer: str) -> bool:
    """Whether what is generated so far can be judged: it differs from the answer, or is longer."""
    text = text.strip()
    return not answer.startswith(text) or len(text) > len(answer)


def play(system: System, text: str, tokens: int) -> Numbers:
    """The answers to twenty questions about a play, each the first line of what is generated."""
    began = time.process_time()
    memory = system.remember(system.encode(text)[:tokens])
    middle = time.process_time()
    questions = play_questions(system.tokenizer)
    given = [
        first_line(system.answer(memory, q.prompt, q.query, 12, lambda text: "\n" in text.lstrip()))
        for q in questions
    ]
    right = [contains(text, q.answer) for text, q in zip(given, questions, strict=True)]
    return {
        "given": [text[:48] for text in given],
        "right": [int(x) for x in right],
        "reading": middle - began,
        "answering": time.process_time() - middle,
    }


def tuning_text(request: Request) -> tuple[str, str]:
    """The document on which settings are chosen: its name and text."""
    known = documents(request.work)
    return (BOOK, known[BOOK]()) if BOOK in known else ("The Tempest", tempest())


def tune_cache(request: Request, progress: Progress) -> Numbers:
    """Mean loss for each weight and sharpness of a cache, unbounded and of the adaptation's bytes."""
    document, text = tuning_text(request)
    window = systems.system("window", request)
    ids = window.encode(text)[: QUICK if request.quick else TUNING_TOKENS["cache"]]
    reader: Any = window.reader
    limit = systems.small_cache(reader.model).limit
    tried = {
        f"{weight:g}, {sharpness:g}, {'all' if bound is None else 'small'}": ContinuousCache(
            weight, sharpness, bound
        )
        for bound in (None, limit)
        for weight in WEIGHTS
        for sharpness in SHARPNESSES
    }
    total, held = dict.fromkeys(tried, 0.0), dict.fromkeys(tried)
    state = reader.windowed.initial_state(1)
    with torch.no_grad():
        for begin in range(0, len(ids) - 1, systems.PIECE):
            piece = ids[begin : min(begin + systems.PIECE, len(ids) - 1)]
            hidden, state = reader.windowed.read(piece[None], state)
            logits = reader.windowed.head.logits(hidden[0])
            for name, cache in tried.items():
                entries: Any = held[name] or cache.empty(hidden.shape[-1])
                mixed, held[name] = cache.read(hidden[0], piece, logits, entries)
                total[name] += _nats(mixed, ids[begin + 1 : begin + 1 + len(piece)])
            progress(begin + len(piece), len(ids))
    means = {name: nats / (len(ids) - 1) for name, nats in total.items()}
    return {"document": document, "tokens": len(ids), "nats": means}


def _nats(logits: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(logits, labels, reduction="sum"))


def tune_dynamic(kind: str, rate: float, request: Request) -> Numbers:
    """Mean loss with one rate of dynamic evaluation."""
    document, text = tuning_text(request)
    model, tokenizer = systems.base()
    system = System(systems.dynamic(model, kind, rate), tokenizer)
    ids = system.encode(text)[: QUICK if request.quick else TUNING_TOKENS["dynamic"]]
    mean = float(system.losses(ids)[0].double().mean())
    about = {"document": document, "tokens": len(ids)}
    return {**about, "nats": mean} if math.isfinite(mean) else {**about, "diverged": True}
