"""What does a memory keep, and why? Small experiments with the models that come with the library.

    python benchmarks/memory_questions.py                          # what is missing, then the report
    python benchmarks/memory_questions.py --questions flood twice  # these alone
    python benchmarks/memory_questions.py --models titans-lmm-tiny

What each asks stands in QUESTIONS and in the report. Nothing is trained. Finished ones are kept in
benchmarks/results/memory_questions.json; tables and pictures go to docs/results.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from kept import known
from memory_report import RESULTS, Row, report
from torch import Tensor
from torch.utils import _pytree as pytree

from titans import zoo
from titans.data import Document, hold_out, load_corpus
from titans.data.needles import TASKS, Needles, make_needles
from titans.evaluate.ask import answered, read
from titans.evaluate.needle import wilson
from titans.memory import MemoryState
from titans.nn import NeuralMemory

TEXTS = 60
CONTEXT = 4096


@dataclass(frozen=True)
class Subject:
    """A model that is asked."""

    name: str
    model: Any
    tokenizer: Any

    def share(self, texts: Sequence[bytes], needles: Sequence[Needles], whole: bool = False) -> Row:
        """How many of the texts, all of one length, are followed by the right answer."""
        ids = stacked(texts)
        cache = read(self.model, ids, piece_length=ids.shape[1] if whole else CONTEXT)[1]
        return self.asked(cache, needles)

    def asked(self, cache: Any, needles: Sequence[Needles]) -> Row:
        """The same of what a cache has read."""
        questions, answers = [n.questions[0] for n in needles], [n.answers[0] for n in needles]
        right = int(answered(self.model, self.tokenizer, cache, questions, answers).sum())
        low, high = wilson(right, len(needles))
        return {"share": right / len(needles), "low": low, "high": high, "texts": len(needles)}


def stacked(texts: Sequence[bytes]) -> np.ndarray:
    return np.stack([np.frombuffer(text, np.uint8) for text in texts])


def facts(task: str, seed: int = 0) -> list[Needles]:
    return [make_needles(TASKS[task], np.random.default_rng([seed, row])) for row in range(TEXTS)]


def text_of(corpus: str, part: Literal["all", "trained", "held out"] = "all") -> bytes:
    documents: list[Document] = load_corpus(corpus)
    if part != "all":
        documents = hold_out(documents)[part == "held out"]
    return b"\n".join(document.data for document in documents)


def slices(text: bytes, length: int, seed: int) -> list[bytes]:
    """One for each fact, from anywhere in the text."""
    generator = np.random.default_rng(seed)
    starts = generator.integers(len(text) - length, size=TEXTS)
    return [text[at : at + length] for at in starts.tolist()]


def said(needles: Needles) -> bytes:
    return needles.statements[0].encode()


def told_before(needles: Sequence[Needles], text: bytes, length: int, seed: int) -> list[bytes]:
    """Each fact and a slice of the text behind it, of one length together."""
    return [(said(n) + rest)[:length] for n, rest in zip(needles, slices(text, length, seed), strict=True)]


def fitted(before: Sequence[bytes], length: int) -> list[bytes]:
    """Of one length, by leaving out of their beginnings what is too much."""
    return [text[len(text) - length :] for text in before]


def flood(subject: Subject) -> Iterator[Row]:
    books = text_of("bible")
    for kind in ("books", "random bytes"):
        for length in (1024, 4096, 16384, 65536):
            needles, generator = facts("number"), np.random.default_rng(length)
            flooded = (
                slices(books, length, length)
                if kind == "books"
                else [generator.bytes(length) for _ in needles]
            )
            before = slices(books, 1024, 1)
            texts = [
                b + said(n) + after + b"\n" for b, n, after in zip(before, needles, flooded, strict=True)
            ]
            yield {"arm": kind, "x": length, **subject.share(fitted(texts, length + 1024), needles)}


def repetition(subject: Subject) -> Iterator[Row]:
    books = text_of("bible")
    for spacing in (0, 256, 1024):
        for times in (1, 2, 4, 8):
            needles, length = facts("number"), 16384
            texts = []
            for n, text in zip(needles, slices(books, 8192 + length, 3), strict=True):
                parts = [text[i * spacing : (i + 1) * spacing] + said(n) for i in range(times)]
                texts.append(text[8192 - 1024 : 8192] + b"".join(parts) + text[8192:])
            shortest = min(map(len, texts))
            yield {
                "arm": f"{spacing} bytes apart",
                "x": times,
                **subject.share(fitted(texts, shortest), needles),
            }


def twice(subject: Subject) -> Iterator[Row]:
    books = text_of("bible")
    for length in (1024, 4096, 16384):
        needles, generator = facts("number"), np.random.default_rng(length)
        once = []
        for n, text in zip(needles, slices(books, length, 5), strict=True):
            at = text.index(b" ", int(generator.integers(length // 2))) + 1
            once.append((text[:at] + said(n) + text[at:])[:length])
        for times in (1, 2):
            arm = "read once" if times == 1 else "read twice"
            yield {"arm": arm, "x": length, **subject.share([text * times for text in once], needles)}


def books(subject: Subject) -> Iterator[Row]:
    for arm, corpus, part in (
        ("plays trained on", "shakespeare", "trained"),
        ("plays held out", "shakespeare", "held out"),
        ("the Bible", "bible", "all"),
    ):
        text = text_of(corpus, part)  # type: ignore[arg-type]
        for length in (1024, 4096, 16384):
            needles = facts("number")
            yield {"arm": arm, "x": length, **subject.share(told_before(needles, text, length, 7), needles)}


def genre(subject: Subject) -> Iterator[Row]:
    """One odd statement among many of one kind, between lines of a book: how surprising, and is it kept?"""
    text = text_of("bible")
    for count in (1, 10, 100):
        for odd in (False, True):
            asked = facts("word" if odd else "number", seed=1)
            generator = np.random.default_rng(count)
            texts, places = [], []
            for row, (n, around) in enumerate(zip(asked, slices(text, 64 * 128, 9), strict=True)):
                others = [
                    said(make_needles(TASKS["number"], np.random.default_rng([2, row, i])))
                    for i in range(count)
                ]
                at = int(generator.integers(count + 1)) if count > 1 else 0
                told = [*others[:at], said(n), *others[at:]]
                parts = [around[i * 64 : (i + 1) * 64] + one for i, one in enumerate(told)]
                texts.append(b"".join(parts) + around[64 * len(told) :])
                places.append((len(b"".join(parts[:at])) + 64, len(said(n))))
            shortest = min(map(len, texts))
            texts = [whole[:shortest] for whole in texts]
            measured = subject.share(texts, asked)
            surprise = surprise_at(subject, texts, places)
            arm = "odd one out" if odd else "one of them"
            yield {"arm": arm, "x": count, "surprise": surprise, **measured}


@torch.no_grad()
def look(subject: Subject, texts: Sequence[bytes]) -> tuple[Sequence[Tensor], Tensor]:
    """Each memory's surprises (texts, bytes, heads), and nats of all bytes but the first."""
    ids = torch.tensor([list(text) for text in texts])
    output = subject.model(ids, use_cache=False, output_surprise=True)
    nats = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return output.surprises, nats


def levels_of(surprises: Sequence[Tensor]) -> Tensor:
    """Surprise over its mean, (texts, bytes), the mean of all layers and heads."""
    return torch.stack([(s / s.mean((0, 1))).mean(-1) for s in surprises]).mean(0)


def surprise_at(subject: Subject, texts: Sequence[bytes], places: Sequence[tuple[int, int]]) -> float:
    """Mean surprise inside the given places over that of the whole texts, layers and heads alike."""
    levels = levels_of(look(subject, texts)[0])
    inside = [levels[row, at : at + size].mean() for row, (at, size) in enumerate(places)]
    return torch.stack(inside).mean().item()


def gating(subject: Subject) -> Iterator[Row]:
    """Read twice: for the surprises, then with the writes of less surprising tokens left out."""
    needles = facts("number")
    texts = told_before(needles, text_of("bible"), CONTEXT, 11)
    surprises, nats = look(subject, texts)
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.25, 0.5, 0.75, 0.9, 0.95):
        for arm in ("less surprising", "at random", "less unlikely"):
            chosen = []
            for surprise in surprises:
                level = surprise
                if arm == "at random":
                    level = torch.rand(surprise.shape, generator=generator)
                elif arm == "less unlikely":
                    # A byte is written when it is read: how unlikely it was is known by then.
                    level = F.pad(nats, (1, 0)).unsqueeze(-1).expand_as(surprise)
                chosen.append(level >= torch.quantile(level.flatten(0, 1)[:50000], share, dim=0))
            with writing_only(subject.model, chosen):
                yield {"arm": arm, "x": share, **subject.share(texts, needles, whole=True)}


@contextmanager
def writing_only(model: Any, chosen: Sequence[Tensor]) -> Iterator[None]:
    """Steps of size 0 where not chosen, (batch, time, heads) for each memory, in calls of these shapes."""
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]

    def only(mask: Tensor) -> Callable[..., Tensor]:
        def opened(_: Any, __: Any, gate: Tensor) -> Tensor:
            return gate * mask.unsqueeze(-1) if gate.shape[:2] == mask.shape[:2] else gate

        return opened

    hooks = [
        memory.step_size_gate.register_forward_hook(only(mask))
        for memory, mask in zip(memories, chosen, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def overwritten(subject: Subject) -> Iterator[Row]:
    books, needles = text_of("bible"), facts("number")
    told = fitted([b + said(n) for b, n in zip(slices(books, 1024, 1), needles, strict=True)], 512)
    memories = [module for module in subject.model.modules() if isinstance(module, NeuralMemory)]
    with_fact = read(subject.model, stacked(told))[1]
    arms = {
        "as it is": (1.0, 1.0, memories),
        "nothing forgotten": (0.0, 1.0, memories),
        "a tenth written": (1.0, 0.1, memories),
        "nothing written": (1.0, 0.0, memories),
        **{f"nothing written in layer {i}": (1.0, 0.0, [m]) for i, m in enumerate(memories)},
    }
    for length in (2048, 8192):
        after = stacked(slices(books, length, 7))
        for arm, (forget, step_size, where) in arms.items():
            hooks = [
                gate.register_forward_hook(lambda _, __, opened, times=times: opened * times)
                for memory in where
                for gate, times in ((memory.forget_gate, forget), (memory.step_size_gate, step_size))
            ]
            try:
                cache = read(subject.model, after, copy.deepcopy(with_fact), CONTEXT)[1]
            finally:
                for hook in hooks:
                    hook.remove()
            yield {"arm": arm, "x": length, **subject.asked(cache, needles)}


def where(subject: Subject) -> Iterator[Row]:
    """Which head holds the fact? One head's memory put back to what it was when the fact had been told, or
    exchanged for what it was then in another text."""
    books, needles = text_of("bible"), facts("number")
    told = fitted([b + said(n) for b, n in zip(slices(books, 1024, 1), needles, strict=True)], 512)
    with_fact = read(subject.model, stacked(told))[1]
    memories = [module for module in subject.model.modules() if isinstance(module, NeuralMemory)]
    for length in (8192, 32768):
        after = read(subject.model, stacked(slices(books, length, 7)), copy.deepcopy(with_fact), CONTEXT)[1]
        yield {"arm": "as it is", "x": length, **subject.asked(after, needles)}
        for layer, head in itertools.product(range(len(memories)), range(memories[0].num_heads)):
            for arm, rows in (("put back", 0), ("another text's", 1)):
                cache = with_head_of(after, with_fact, layer, head, rows)
                name = f"layer {layer}, head {head} {arm}"
                yield {"arm": name, "x": length, **subject.asked(cache, needles)}


def with_head_of(cache: Any, other: Any, layer: int, head: int, rows: int) -> Any:
    """A copy of the cache with one head's memory from another, whose rows are moved on by so many."""
    count = itertools.count()

    def exchange(mine: Any, theirs: Any) -> Any:
        if not isinstance(mine, MemoryState) or next(count) != layer:
            return mine
        pairs = (zip(*each, strict=True) for each in zip(tensors_of(mine), tensors_of(theirs), strict=True))
        new = [tuple(one_head(a, b.roll(rows, 0), head) for a, b in pair) for pair in pairs]
        return MemoryState(*new, mine.position)

    exchanged = copy.deepcopy(cache)
    is_memory = {"is_leaf": lambda state: isinstance(state, MemoryState)}
    exchanged.store(pytree.tree_map(exchange, cache.states, other.states, **is_memory), 0)
    return exchanged


def tensors_of(memory: MemoryState) -> tuple[tuple[Tensor, ...], ...]:
    return memory.weights, memory.momentum, memory.anchor


def one_head(mine: Tensor, theirs: Tensor, head: int) -> Tensor:
    return torch.cat([mine[:, :head], theirs[:, head : head + 1], mine[:, head + 1 :]], 1)


class Question(NamedTuple):
    """ask: the measurements. axis: what their places are. meaning: what is asked, for the report."""

    ask: Callable[[Subject], Iterator[Row]]
    axis: str
    meaning: str


QUESTIONS = {
    "flood": Question(flood, "bytes after the fact", "A fact, then books or random bytes."),
    "repetition": Question(
        repetition,
        "times said, 16,384 bytes before the question",
        "A fact said several times, at several spacings.",
    ),
    "twice": Question(twice, "bytes of context", "The context read once or twice before the question."),
    "books": Question(
        books,
        "bytes after the fact",
        "Facts told in plays that were trained on, in plays that were not, and in the Bible.",
    ),
    "genre": Question(
        genre,
        "facts of the usual kind",
        "A number among many numbers, or a word among as many, is asked for. surprise: ‖M(k) − v‖² over its "
        "statement, 1 being the mean of the text.",
    ),
    "overwritten": Question(
        overwritten,
        "bytes after the fact",
        "What is read after the fact forgets nothing, writes a tenth or nothing, in all layers or in one.",
    ),
    "where": Question(
        where,
        "bytes after the fact",
        "Before the question one head's memory is put back to what it was when the fact had been told, or "
        "exchanged for what another text left in it then.",
    ),
    "gating": Question(
        gating,
        f"share of writes skipped, of {CONTEXT:,} bytes",
        "Writes are skipped below a quantile of surprise, of how unlikely the model found the byte, or at "
        "random. Not of MAC, which writes segment by segment.",
    ),
}


def correlation(subject: Subject) -> float:
    """Spearman's, between a byte's surprise (mean over memories) and how unlikely the model found it."""
    surprises, nats = look(subject, slices(text_of("bible"), CONTEXT, 13)[:8])
    pair = (nats.flatten(), levels_of(surprises)[:, 1:].flatten())
    ranks = [x.argsort().argsort().double() for x in pair]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=zoo.names(), help="names or folders")
    parser.add_argument("--questions", nargs="+", default=list(QUESTIONS), choices=list(QUESTIONS))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    about = {
        "date": str(datetime.date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }
    for path in arguments.models:
        subject = Subject(Path(path).name, *zoo.load(path))
        for question in arguments.questions:
            key = f"{subject.name}, {question}"
            with known(RESULTS) as found:
                done = key in found
            if done or (question == "gating" and subject.model.config.variant == "mac"):
                continue
            rows = []
            for row in QUESTIONS[question].ask(subject):
                print(f"{key}: {row}", file=sys.stderr)
                rows.append(row)
            result: dict[str, Any] = {"rows": rows, **about}
            if question == "gating":
                result["rank"] = correlation(subject)
            with known(RESULTS) as found:
                found[key] = result
    report({name: (q.axis, q.meaning) for name, q in QUESTIONS.items()}, TEXTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
