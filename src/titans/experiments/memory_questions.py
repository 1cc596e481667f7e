"""What does a memory keep, and why? Small measurements on the models in the zoo, without training.

A text states a seven-digit number and asks for it at the end. `QUESTIONS` and the page list what each
question varies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from titans import zoo
from titans.data import hold_out, load_corpus
from titans.data.needles import TASKS, make_needles
from titans.evaluate.needle import wilson
from titans.experiments.results import Numbers, Results
from titans.experiments.runner import Cell, Experiment, Progress, Request, say
from titans.experiments.subject import (
    CONTEXT,
    TEXTS,
    Subject,
    last_bytes,
    only_where,
    statement,
    surprise_levels,
    with_head_of,
)
from titans.experiments.tables import markdown, percent
from titans.experiments.trained import chosen_models, text_of

QUICK_TEXTS, QUICK_LENGTH = 3, 4096
# Arm, place on the axis, right answers, texts, and surprise where it was measured.
Row = tuple[Any, ...]


def after_fact(subject: Subject, text: bytes, length: int, seed: int) -> tuple[list[Any], list[bytes]]:
    """Facts, and texts of one length that begin with them."""
    needles = subject.facts("number")
    slices = subject.slices(text, length, seed)
    return needles, [(statement(n) + rest)[:length] for n, rest in zip(needles, slices, strict=True)]


def stated(subject: Subject) -> tuple[list[Any], Any]:
    """Facts, and the cache after 512 bytes of the Bible that end with them."""
    needles = subject.facts("number")
    slices = subject.slices(text_of("bible"), 1024, 1)
    texts = [before + statement(n) for before, n in zip(slices, needles, strict=True)]
    return needles, subject.read(last_bytes(texts, 512))


def flood(subject: Subject) -> Iterator[Row]:
    books = text_of("bible")
    for kind in ("books", "random bytes"):
        for length in (1024, 4096, 16384, 65536):
            needles, generator = subject.facts("number"), np.random.default_rng(length)
            after = (
                subject.slices(books, length, length)
                if kind == "books"
                else [generator.bytes(length) for _ in needles]
            )
            before = subject.slices(books, 1024, 1)
            texts = [b + statement(n) + a + b"\n" for b, n, a in zip(before, needles, after, strict=True)]
            cache = subject.read(last_bytes(texts, length + 1024))
            yield kind, length, *subject.recalled(needles, cache)


def repetition(subject: Subject) -> Iterator[Row]:
    books, length = text_of("bible"), 16384
    for spacing in (0, 256, 1024):
        for times in (1, 2, 4, 8):
            needles, texts = subject.facts("number"), []
            for n, text in zip(needles, subject.slices(books, 8192 + length, 3), strict=True):
                parts = [text[i * spacing : (i + 1) * spacing] + statement(n) for i in range(times)]
                texts.append(text[8192 - 1024 : 8192] + b"".join(parts) + text[8192:])
            cache = subject.read(last_bytes(texts, min(map(len, texts))))
            yield f"{spacing} bytes apart", times, *subject.recalled(needles, cache)


def twice(subject: Subject) -> Iterator[Row]:
    books = text_of("bible")
    for length in (1024, 4096, 16384):
        needles, generator = subject.facts("number"), np.random.default_rng(length)
        once = []
        for n, text in zip(needles, subject.slices(books, length, 5), strict=True):
            at = text.index(b" ", int(generator.integers(length // 2))) + 1
            once.append((text[:at] + statement(n) + text[at:])[:length])
        for times, arm in ((1, "read once"), (2, "read twice")):
            yield arm, length, *subject.recalled(needles, subject.read([text * times for text in once]))


def books(subject: Subject) -> Iterator[Row]:
    trained, held_out = (
        b"\n".join(document.data for document in part) for part in hold_out(load_corpus("shakespeare"))
    )
    texts = {"plays trained on": trained, "plays held out": held_out, "the Bible": text_of("bible")}
    for arm, text in texts.items():
        for length in (1024, 4096, 16384):
            needles, read = after_fact(subject, text, length, 7)
            yield arm, length, *subject.recalled(needles, subject.read(read))


def genre(subject: Subject) -> Iterator[Row]:
    """One statement of another kind among many of one kind, in a book: its surprise and recall."""
    text = text_of("bible")
    for count in (1, 10, 100):
        for odd in (False, True):
            asked = subject.facts("word" if odd else "number", seed=1)
            generator = np.random.default_rng(count)
            texts, places = [], []
            for row, (n, around) in enumerate(zip(asked, subject.slices(text, 64 * 128, 9), strict=True)):
                others = [
                    statement(make_needles(TASKS["number"], np.random.default_rng([2, row, i])))
                    for i in range(count)
                ]
                at = int(generator.integers(count + 1)) if count > 1 else 0
                inserted = [*others[:at], statement(n), *others[at:]]
                parts = [around[i * 64 : (i + 1) * 64] + one for i, one in enumerate(inserted)]
                texts.append(b"".join(parts) + around[64 * len(inserted) :])
                places.append((len(b"".join(parts[:at])) + 64, len(statement(n))))
            texts = [whole[: min(map(len, texts))] for whole in texts]
            levels = surprise_levels(subject.look(texts)[0])
            inside = [levels[row, at : at + size].mean() for row, (at, size) in enumerate(places)]
            surprise = torch.stack(inside).mean().item()
            found = subject.recalled(asked, subject.read(texts))
            yield "odd one out" if odd else "one of them", count, *found, surprise


def gating(subject: Subject) -> Iterator[Row]:
    """Read twice: for the surprises, then with the writes of less surprising tokens left out."""
    needles, texts = after_fact(subject, text_of("bible"), CONTEXT, 11)
    surprises, nats = subject.look(texts)
    # A byte is written after it is read, when its loss is known.
    unlikely = F.pad(nats, (1, 0)).unsqueeze(-1)
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.25, 0.5, 0.75, 0.9, 0.95):
        for arm in ("less surprising", "at random", "less unlikely"):
            chosen = []
            for surprise in surprises:
                level = {
                    "less surprising": lambda s: s,
                    "at random": lambda s: torch.rand(s.shape, generator=generator),
                    "less unlikely": unlikely.expand_as,
                }[arm](surprise)
                limit = torch.quantile(level.flatten(0, 1)[:50000], share, dim=0)
                chosen.append(only_where(level >= limit))
            changed = subject.with_gates(chosen)
            cache = changed.read(texts, piece_length=CONTEXT)
            yield arm, share, *changed.recalled(needles, cache)


def overwritten(subject: Subject) -> Iterator[Row]:
    needles, with_fact = stated(subject)
    count = len(subject.memories)
    arms = {
        "unchanged": subject,
        "nothing forgotten": subject.with_gates([1.0] * count, [0.0] * count),
        "a tenth written": subject.with_gates([0.1] * count),
        "nothing written": subject.with_gates([0.0] * count),
    }
    for layer in range(count):
        step_sizes = [float(other != layer) for other in range(count)]
        arms[f"nothing written in layer {layer}"] = subject.with_gates(step_sizes)
    for length in (2048, 8192):
        after = subject.slices(text_of("bible"), length, 7)
        for arm, changed in arms.items():
            cache = changed.read(after, with_fact)
            yield arm, length, *subject.recalled(needles, cache)


def where(subject: Subject) -> Iterator[Row]:
    needles, with_fact = stated(subject)
    heads = range(subject.memories[0].num_heads)
    for length in (8192, 32768):
        after = subject.read(subject.slices(text_of("bible"), length, 7), with_fact)
        yield "unchanged", length, *subject.recalled(needles, after)
        for layer, head in itertools.product(range(len(subject.memories)), heads):
            for arm, shift in (("restored", 0), ("another text's", 1)):
                cache = with_head_of(after, with_fact, layer, head, shift)
                name = f"layer {layer}, head {head} {arm}"
                yield name, length, *subject.recalled(needles, cache)


class Question(NamedTuple):
    """ask: the measurements. axis: the quantity that varies. meaning: a sentence for the page."""

    ask: Callable[[Subject], Iterator[Row]]
    axis: str
    meaning: str


AFTER = "bytes after the fact"
QUESTIONS = {
    "flood": Question(flood, AFTER, "A fact, then books or random bytes."),
    "repetition": Question(
        repetition,
        "statements, 16,384 bytes before the question",
        "A fact stated several times, at several spacings.",
    ),
    "twice": Question(twice, "bytes of context", "The context read once or twice before the question."),
    "books": Question(
        books, AFTER, "Facts in plays that were trained on, in plays that were not, and in the Bible."
    ),
    "genre": Question(
        genre,
        "facts of the usual kind",
        "A number among many numbers, or a word among as many, is asked for. surprise: ‖M(k) − v‖² over its "
        "statement, 1 being the mean of the text.",
    ),
    "overwritten": Question(
        overwritten,
        AFTER,
        "What is read after the fact forgets nothing, writes a tenth or nothing, in all layers or in one.",
    ),
    "where": Question(
        where,
        AFTER,
        "Before the question one head's memory is restored to its value right after the statement, or "
        "exchanged for its value then in another text.",
    ),
    "gating": Question(
        gating,
        f"share of writes skipped, of {CONTEXT:,} bytes",
        "Writes are skipped below a quantile of surprise, of how unlikely the model found the byte, or at "
        "random. Not of MAC, which writes segment by segment.",
    ),
}


class MemoryQuestions(Experiment):
    """A cell for each model and question."""

    name = "memory"
    title = "What a memory keeps"

    def cells(self, request: Request) -> list[Cell]:
        questions = ["twice", "genre"] if request.quick else list(QUESTIONS)
        return [
            Cell(f"{label}, {question}", (model, question))
            for label, model in chosen_models(request).items()
            for question in questions
            if question != "gating" or zoo.load_config(Path(model)).variant != "mac"
        ]

    def measure(self, cell: Cell, request: Request, progress: Progress) -> Numbers:
        model, question = cell.settings
        subject = Subject(*zoo.load(model), QUICK_TEXTS if request.quick else TEXTS)
        rows = []
        for row in QUESTIONS[question].ask(subject):
            say(f"  {row}")
            rows.append(list(row))
        found: Numbers = {"rows": rows}
        if question == "gating":
            found["rank"] = rank_correlation(subject)
        return found

    def table(self, results: Results) -> str:
        parts = [f"{TEXTS} texts for each point, answers generated and exact, % with 95 % interval."]
        ranks = []
        for question, (_, axis, meaning) in QUESTIONS.items():
            kept = of_question(results, question)
            parts += [f"## {question}", meaning] if kept else []
            for label, cell in kept.items():
                parts.append(question_table(f"{label}: {axis}", cell["rows"]))
                ranks += [f"{label} {cell['rank']:.2f}"] if "rank" in cell else []
        if ranks:
            parts.append(
                "Rank correlation of surprise with the language model's loss, byte by byte: "
                f"{', '.join(ranks)}."
            )
        return "\n\n".join(parts)

    def draw(self, results: Results, folder: Path) -> dict[str, str]:
        drawn = {}
        for question, (_, axis, _) in QUESTIONS.items():
            if kept := of_question(results, question):
                file = f"{self.name}-{question}.png"
                draw_question(kept, axis, folder / file)
                drawn[file] = question
        return drawn


def of_question(results: Results, question: str) -> dict[str, Numbers]:
    """The cells of a question by model."""
    named = {tuple(name.split(", ")): cell for name, cell in results.cells.items()}
    return {label: cell for (label, asked), cell in sorted(named.items()) if asked == question}


def arms_and_places(rows: list[Row]) -> tuple[list[str], list[float]]:
    return list(dict.fromkeys(row[0] for row in rows)), list(dict.fromkeys(row[1] for row in rows))


def question_table(title: str, rows: list[Row]) -> str:
    """Arms side by side, or below each other where they are many."""
    arms, places = arms_and_places(rows)
    shown = {
        (arm, x): percent(right, texts) + (f", surprise {surprise[0]:.2f}" if surprise else "")
        for arm, x, right, texts, *surprise in rows
    }
    if len(arms) <= 2 * len(places):
        return markdown([title, *arms], [[f"{x:,}", *(shown[arm, x] for arm in arms)] for x in places])
    head = [title, *(f"{x:,}" for x in places)]
    return markdown(head, [[arm, *(shown[arm, x] for x in places)] for arm in arms])


def draw_question(kept: dict[str, Numbers], axis_name: str, path: Path) -> None:
    """A panel for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(kept), 3.2), layout="constrained")
    panels = figure.subplots(1, len(kept), squeeze=False)[0]
    for axis, (label, cell) in zip(panels, kept.items(), strict=True):
        arms, places = arms_and_places(cell["rows"])
        for arm in arms:
            counts = [(right, texts) for a, _, right, texts, *_ in cell["rows"] if a == arm]
            shares = [100 * right / texts for right, texts in counts]
            bounds = [[100 * bound for bound in wilson(*count)] for count in counts]
            axis.plot([str(x) for x in places], shares, "o-", label=arm)
            axis.fill_between(range(len(places)), *zip(*bounds, strict=True), alpha=0.12)
        axis.set(title=label, xlabel=axis_name, ylabel="% right", ylim=(-3, 103))
        # Many names would hide the lines.
        outside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(arms) > 8 else {}
        axis.legend(frameon=False, fontsize=8, **outside)
    figure.savefig(path, dpi=130)


def rank_correlation(subject: Subject) -> float:
    """Spearman's, between a byte's surprise (mean over memories) and how unlikely the model found it."""
    surprises, nats = subject.look(subject.slices(text_of("bible"), CONTEXT, 13)[:8])
    pair = (nats.flatten(), surprise_levels(surprises)[:, 1:].flatten())
    ranks = [x.argsort().argsort().double() for x in pair]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()
