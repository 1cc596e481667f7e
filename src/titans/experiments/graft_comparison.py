"""What would a practitioner do instead of a graft? Systems around one pretrained model, on the same texts.

Each system is measured in prediction by position, in recall of facts from haystacks, in RULER's tasks, and
with twenty sentences to complete about an address. Settings are chosen on one document, by cells of their
own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.baselines.continuous_cache import ContinuousCache
from titans.evaluate.ask import is_answer
from titans.experiments import graft_comparison_systems as systems
from titans.experiments.graft_comparison_cloze import SENTENCES, address, contains, first_line, prompt
from titans.experiments.graft_comparison_found import RANGES
from titans.experiments.graft_comparison_page import page
from titans.experiments.graft_comparison_picture import ABOUT_PICTURE, PICTURE, draw
from titans.experiments.graft_comparison_systems import (
    BASELINES,
    REFERENCE,
    RETRIEVAL,
    System,
    trained_grafts,
    weights_of,
)
from titans.experiments.graft_comparison_texts import (
    FACTS,
    HAYSTACKS,
    NEEDLES,
    SAMPLES,
    WORDINGS,
    haystacks,
)
from titans.experiments.held_out import BOOK, ESSAYS, PLAY, SPEECHES, documents, tempest
from titans.experiments.results import Numbers, Results
from titans.experiments.ruler import RULER_TASKS, ruler_samples, ruler_score
from titans.experiments.runner import Cell, Experiment, Progress, Request
from titans.zoo.smollm import smollm_folder

QUICK = 512
# Tokens of a document that all systems read; those of constant cost go on to the third number.
SHORT, LONG = 8192, 65536
# All systems but dynamic evaluation read the play further, and in float32.
PLAY_TOKENS = 16384
# The documents that dynamic evaluation reads.
OF_DYNAMIC = (PLAY, ESSAYS)
# Systems that read at constant cost, or nearly so.
CHEAP = ("window", "cache", "small cache", "adaptation")
# Longest haystacks: for systems with a backward pass, which are asked for one fact; with several facts.
LONGEST_OF_DYNAMIC, LONGEST_OF_SEVERAL = 4096, 16384
RULER_LENGTHS = (4096, 16384)
# Approximate processor seconds of a system for 1,000 tokens read, and for a question: dynamic evaluation in
# float32, the others in bfloat16.
COSTS = {
    "window": (2.5, 1), "full attention": (3, 1.5), "cache": (3.2, 1), "small cache": (2.6, 1),
    "adaptation": (3.4, 1.5), "dynamic SGD": (13, 4), "dynamic Adam": (20, 5), "dynamic LoRA": (12, 3),
    RETRIEVAL: (0, 2), REFERENCE: (5, 2),
}  # fmt: skip
_OF_TRAINED = (3.8, 1.5)
# Tried on the first tokens of one document: weights and sharpnesses of a cache; rates of dynamic evaluation.
TUNING_TOKENS = {"cache": 8192, "dynamic": 2048}
WEIGHTS, SHARPNESSES = (0.02, 0.05, 0.1, 0.2), (10.0, 20.0, 40.0)
RATES = {"SGD": (1e-3, 3e-3, 1e-2), "Adam": (3e-6, 1e-5, 3e-5, 1e-4), "LoRA": (3e-4, 1e-3, 3e-3)}


class Measured(NamedTuple):
    """What a cell measures. what: "tuning", "prediction", "cloze", "ruler" or a kind of haystack. where: the
    document, RULER's task, or the setting that is tried. tokens: how many are read; 0 where `what` fixes it.
    """

    what: str
    where: str
    tokens: int
    system: str

    @property
    def name(self) -> str:
        tokens = f"{self.tokens}" if self.tokens else ""
        return ", ".join(part for part in (self.what, self.where, tokens, self.system) if part)

    @property
    def is_sampled(self) -> bool:
        """Whether another seed asks other questions."""
        return self.what in HAYSTACKS or self.what == "ruler"

    @property
    def dtype(self) -> torch.dtype:
        """Of the pretrained model. Steps of dynamic evaluation vanish in bfloat16."""
        tuned = self.what == "tuning" and self.system != "cache"
        wide = tuned or self.system.startswith("dynamic") or self.system == REFERENCE
        return torch.float32 if wide or (self.what, self.where) == ("prediction", PLAY) else torch.bfloat16


def planned(request: Request, known: Sequence[str]) -> Iterator[list[Measured]]:
    """Groups in order of importance, for the documents that are known."""
    everyone = [*BASELINES, *trained_grafts(request)]
    asked = [name for name in everyone if not name.startswith("dynamic")]
    readers = [name for name in asked if name != RETRIEVAL]
    dynamic = [name for name in everyone if name.startswith("dynamic")]
    constant = [name for name in readers if name in CHEAP or name not in BASELINES]

    def recall(kinds: Iterable[str], lengths: Iterable[int], names: Sequence[str] = asked) -> list[Measured]:
        return [Measured(kind, "", n, name) for kind in kinds for n in lengths for name in names]

    yield [Measured("tuning", kind, 0, f"{rate:g}") for kind, rates in RATES.items() for rate in rates]
    for document in (d for d in OF_DYNAMIC if d in known):
        names = dynamic if document == PLAY else [REFERENCE, *dynamic]
        yield [Measured("prediction", document, SHORT, name) for name in names]
    for document in known:
        tokens = PLAY_TOKENS if document == PLAY else SHORT
        yield [Measured("prediction", document, tokens, name) for name in readers]
    yield recall(NEEDLES[:1], [1024])
    if SPEECHES in known:
        yield [Measured("cloze", "", 0, name) for name in asked]
    yield recall(("four", "values"), [4096])
    # The essays come in RULER's package.
    tasks = RULER_TASKS if ESSAYS in known else ()
    yield [Measured("ruler", task, RULER_LENGTHS[0], name) for task in tasks for name in asked]
    yield recall(NEEDLES[:1], [4096])
    yield recall(WORDINGS, [1024, 4096])
    yield recall(HAYSTACKS[1:], [1024])
    yield recall(NEEDLES[:1], [1024, LONGEST_OF_DYNAMIC], dynamic)
    if SPEECHES in known:
        yield [Measured("cloze", "", 0, name) for name in dynamic]
    yield [Measured("tuning", "", 0, "cache")]
    if not request.quick:
        yield recall(HAYSTACKS, [4096, LONGEST_OF_SEVERAL])
        yield [Measured("ruler", task, RULER_LENGTHS[1], name) for task in tasks for name in asked]
        yield recall(NEEDLES[:1], [n for n in SAMPLES if n > LONGEST_OF_SEVERAL], [*constant, RETRIEVAL])
        yield [Measured("prediction", document, LONG, name) for document in known for name in constant]


def cost(measured: Measured) -> float:
    """Approximate processor seconds."""
    if measured.what == "tuning":
        kind = "cache" if measured.system == "cache" else "dynamic"
        system = "cache" if kind == "cache" else f"dynamic {measured.where}"
        return TUNING_TOKENS[kind] / 1000 * COSTS[system][0]
    reading, asking = COSTS.get(measured.system, _OF_TRAINED)
    tokens = min(measured.tokens, 8192) if measured.system == "full attention" else measured.tokens
    if measured.what == "prediction":
        return tokens / 1000 * reading * (2 if measured.where == PLAY else 1)
    if measured.what == "cloze":
        return 5 * reading + len(SENTENCES) * asking
    if measured.what == "ruler":
        return tokens / 1000 * reading + 8
    questions = {"one": 3, "two": 4, "four": 8, **dict.fromkeys(WORDINGS, FACTS)}.get(measured.what, 1)
    return SAMPLES[measured.tokens] * (tokens / 1000 * reading + questions * asking)


class GraftComparison(Experiment):
    """A cell for each system, task and text; questions also for each seed.

    The hash of a trained graft is one of its cells' conditions, so that no figure stands for other weights.
    """

    name = "graft-comparison"
    title = "A graft compared with what a practitioner would do instead"
    unit = 1.0

    def cells(self, request: Request) -> list[Cell]:
        known = [*documents()]
        hashed = cache(lambda name: weights_of(name, request))
        found: dict[str, Cell] = {}
        for group in planned(request, known):
            for seed in range(request.seeds or 1):
                for m in group:
                    if seed and not m.is_sampled:
                        continue
                    name = f"{m.name}, seed {seed}" if m.is_sampled else m.name
                    conditions: dict[str, Any] = {"dtype": str(m.dtype).removeprefix("torch.")}
                    if (weights := hashed(m.system)) is not None:
                        conditions["weights"] = weights
                    if m.what in HAYSTACKS:
                        conditions["texts"] = known
                    found.setdefault(name, Cell(name, m, seed, cost(m), conditions))
        return [*found.values()]

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        measured: Measured = cell.settings
        if measured.what == "tuning":
            if measured.system == "cache":
                return tune_cache(request, progress)
            return tune_dynamic(measured.where, float(measured.system), request)
        system = systems.system(measured.system, request, measured.dtype)
        if measured.what == "prediction":
            text = documents()[measured.where]()
            return prediction(system, text, QUICK if request.quick else measured.tokens)
        if measured.what == "cloze":
            return complete(system, address(), QUICK if request.quick else None)
        if measured.what == "ruler":
            return ruler(system, measured, cell.seed, request)
        texts = [text() for text in documents().values()]
        return recall(system, texts, measured, cell.seed, request, progress)

    def table(self, results: Results) -> str:
        return page(results.cells)

    def draw(self, results: Results, folder: Path) -> dict[str, str]:
        return {PICTURE: ABOUT_PICTURE} if draw(results.cells, folder / PICTURE) else {}


def prediction(system: System, text: str, tokens: int) -> Numbers:
    """Losses by position, processor seconds, and bytes held afterwards."""
    ids = system.encode(text)[:tokens]
    began = system.seconds()
    losses, memory = system.losses(ids)
    seconds = system.seconds() - began
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
        began = system.seconds()
        memory = system.remember(asked.ids)
        middle = system.seconds()
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
        reading, answering = reading + middle - began, answering + system.seconds() - middle
        progress(number + 1, samples)
        if request.quick:
            break
    return {"right": right, "reading": reading, "answering": answering}


def decided(text: str, answer: str) -> bool:
    """Whether what is generated so far can be judged: it differs from the answer, or is longer."""
    text = text.strip()
    return not answer.startswith(text) or len(text) > len(answer)


def complete(system: System, text: str, tokens: int | None) -> Numbers:
    """What is generated after each of twenty sentences about a text, up to the end of the line."""
    began = system.seconds()
    memory = system.remember(system.encode(text)[:tokens])
    middle = system.seconds()
    given = [
        first_line(system.answer(memory, prompt(s), s, 10, lambda text: "\n" in text.lstrip()))
        for s, _ in SENTENCES
    ]
    right = [contains(text, answer) for text, (_, answer) in zip(given, SENTENCES, strict=True)]
    return {
        "given": [text[:40] for text in given],
        "right": [int(x) for x in right],
        "reading": middle - began,
        "answering": system.seconds() - middle,
    }


def ruler(system: System, measured: Measured, seed: int, request: Request) -> Numbers:
    """RULER's score of one sample, from 0 to 1."""
    task = measured.where
    sample, *_ = ruler_samples(task, measured.tokens, seed, smollm_folder(), request.work / "ruler")
    began = system.seconds()
    memory = system.remember(system.encode(sample.context))
    middle = system.seconds()
    given = system.answer(
        memory,
        sample.question,
        sample.question,
        RULER_TASKS[task],
        lambda text: ruler_score(text, sample.answers) == 1,
    )
    return {
        "score": ruler_score(given, sample.answers),
        "reading": middle - began,
        "answering": system.seconds() - middle,
    }


def tuning_text() -> tuple[str, str]:
    """The document on which settings are chosen: its name and text."""
    known = documents()
    return (BOOK, known[BOOK]()) if BOOK in known else ("The Tempest", tempest())


def tune_cache(request: Request, progress: Progress) -> Numbers:
    """Mean loss for each weight and sharpness of a cache, unbounded and of the adaptation's bytes."""
    document, text = tuning_text()
    window = systems.system("window", request, torch.bfloat16)
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
    document, text = tuning_text()
    base = systems.system("window", request)
    reader: Any = base.reader
    system = System(systems.dynamic(reader.model, kind, rate), base.tokenizer)
    ids = system.encode(text)[: QUICK if request.quick else TUNING_TOKENS["dynamic"]]
    mean = float(system.losses(ids)[0].double().mean())
    about = {"document": document, "tokens": len(ids)}
    return {**about, "nats": mean} if math.isfinite(mean) else {**about, "diverged": True}
