"""A pretrained model reads a play that its window cannot hold, with a memory and without: `make demo`."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from titans.data import encode_document, leading_tokens, load_corpus
from titans.experiments.runner import say
from titans.hf import GraftCache, GraftedForCausalLM
from titans.hf.graft import graft
from titans.hf.graft.cache import GraftState
from titans.inspection import GraftInspection, GraftReading, draw_graft_inspection, write_page
from titans.inspection.graft_page import percent, place
from titans.inspection.grafted import PIECE_LENGTH, LossAt, joined
from titans.state import state_nbytes
from titans.stream.model import reading
from titans.stream.text import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CORPUS, PLAY, TITLE = "shakespeare", "king-lear", "King Lear"
_SECONDS_BETWEEN_LINES = 15.0
# Tokens of an answer, at most.
_ANSWER_LENGTH = 12


@dataclass(frozen=True)
class Fact:
    """A statement that stands before the play, the beginning of the same statement, which is asked for after
    it, and how it goes on."""

    statement: str
    question: str
    answer: str


# Nothing that a pretrained model could know.
FACTS = tuple(
    Fact(f"{question} {answer}.", question, answer)
    for question, answer in (
        ("The password to the north gate is", "hawthorn"),
        ("The password to the boathouse is", "marigold"),
        ("The number of Dr. Okafor's room is", "4172"),
        ("The number of the blue locker is", "60935"),
        ("The name of the captain's dog is", "Biscuit"),
        ("The letters are hidden under the", "piano"),
    )
)


@dataclass(frozen=True)
class Answer:
    """What was said to a fact's question after the book: with the memory, and by the base in its window."""

    fact: Fact
    with_memory: str
    without: str

    @property
    def recalled(self) -> tuple[bool, bool]:
        """Whether either begins with the fact's answer as a whole word or number."""
        answer = re.compile(rf"\s*{re.escape(self.fact.answer)}\b", re.IGNORECASE)
        return bool(answer.match(self.with_memory)), bool(answer.match(self.without))


@dataclass(frozen=True)
class BookDemo:
    """What was read and measured.

    found: without the facts. answers: of each fact. tokens_in_book: of the whole book. seconds: of reading.
    state_bytes: the most that the graft holds after any text. cache_bytes: what the base's own cache of the
    tokens read would hold.
    """

    found: GraftInspection
    answers: tuple[Answer, ...]
    tokens_in_book: int
    seconds: float
    state_bytes: int
    cache_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return len(self.found.ids) / self.seconds


def read_book(
    model: GraftedForCausalLM, tokenizer: PreTrainedTokenizerBase, text: bytes, seconds: float
) -> BookDemo:
    """Read the facts and a book from its beginning until its end or until the time is over, then ask.

    Both arms, with and without the memory, come from one pass of the base. Reports to stderr how far it is.
    """
    ids = torch.tensor(encode_document(tokenizer, text, "the book").tolist())
    notes = " ".join(fact.statement for fact in FACTS) + "\n\n"
    beginning = [
        *leading_tokens(tokenizer),
        *encode_document(tokenizer, notes.encode(), "the facts").tolist(),
    ]
    reader, parts, done = GraftReading(model, beginning=beginning), [], 0
    began = said = time.perf_counter()
    for piece in ids.split(PIECE_LENGTH):
        parts.append(reader.read(piece))
        done += len(piece)
        now = time.perf_counter()
        if now - said >= _SECONDS_BETWEEN_LINES:
            said, rate = now, done / (now - began)
            left = min((len(ids) - done) / rate, began + seconds - now)
            so_far = joined(parts).whole()
            say(
                f"  {done:,} tokens · {rate:,.0f} tokens/s · {max(left, 0):.0f} s left · nats per token "
                f"{so_far.base:.3f} without, {so_far.loss:.3f} with the memory ({percent(so_far)})"
            )
        if now - began >= seconds:
            break
    taken = time.perf_counter() - began
    state_bytes, per_token = state_sizes(model)
    return BookDemo(
        joined(parts),
        ask(model, tokenizer, reader.cache, FACTS),
        len(ids),
        taken,
        state_bytes,
        done * per_token,
    )


def ask(
    model: GraftedForCausalLM, tokenizer: PreTrainedTokenizerBase, cache: GraftCache, facts: Sequence[Fact]
) -> tuple[Answer, ...]:
    """Ask for facts after what a cache has read, which is not changed, with the memory and without."""
    config = model.config
    plain = graft(model.base, window=config.window, sinks=config.sinks, adaptation=False)
    window = plain.empty_cache()
    assert cache.state is not None
    window.store((GraftState(cache.state.window),), cache.num_columns)
    answers = []
    for fact in facts:
        question = encode_document(tokenizer, f"\n\n{fact.question}".encode(), "the question")
        ids = torch.tensor([question.tolist()])
        with_memory, without = (
            _continued(reader, ids, state.clone(), tokenizer)
            for reader, state in ((model, cache), (plain, window))
        )
        answers.append(Answer(fact, with_memory, without))
    return tuple(answers)


def _continued(
    model: GraftedForCausalLM, ids: Tensor, cache: GraftCache, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The likeliest tokens after ids (1, n), to the end of the sentence or line; the cache is changed."""
    text = ""
    with reading(model):
        tokens: list[int] = []
        for _ in range(_ANSWER_LENGTH):
            output = model(ids.to(model.device), past_key_values=cache, logits_to_keep=1)
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(ids))
            text = decode(tokenizer, tokens)
            if any(end in text.strip() for end in ".\n"):
                break
    return text.strip().partition("\n")[0]


def state_sizes(model: GraftedForCausalLM) -> tuple[int, int]:
    """Bytes of a row: the most that a graft holds after any text, and what its base keeps of each token."""
    state = model.initial_state(1)
    keys_and_values = (*state.window.keys, *state.window.values)
    per_token = sum(x.shape[1] * x.shape[3] * x.element_size() for x in keys_and_values)
    return state_nbytes(state) + per_token * (model.config.window + model.config.sinks), per_token


def table(found: GraftInspection) -> str:
    """Losses by position, a line each."""
    parts = [(place(part), part) for part in found.by_position()] + [("all", found.whole())]
    lines = [f"{'nats per token':26} {'tokens':>7} {'without':>8} {'with':>8} {'change':>8}"]
    for name, part in parts:
        lines.append(f"{name:26} {part.tokens:7,} {part.base:8.3f} {part.loss:8.3f} {percent(part):>8}")
    return "\n".join(lines)


def verdict(demo: BookDemo, name: str, window: int) -> str:
    """Three lines: what was read at which cost, and what the memory gained in prediction and in recall,
    whichever way it fell."""
    found = demo.found
    last, whole = found.by_position()[-1], found.whole()
    read = f"{len(found.ids):,} of the {demo.tokens_in_book:,}"
    right, right_without = (sum(each) for each in zip(*(a.recalled for a in demo.answers), strict=True))
    return "\n".join(
        [
            f"{name} read {read} tokens of {TITLE}, and saw at most {window} of them at a time: "
            f"{demo.tokens_per_second:,.0f} tokens/s. Its state has at most {demo.state_bytes / 1e6:.1f} MB "
            "after any text; the model's own cache of these tokens would have "
            f"{demo.cache_bytes / 1e6:,.0f} MB.",
            f"Its memory, which learns while it reads, {_changed(whole)}, and on {place(last)} "
            f"{_changed(last)}.",
            f"Of {len(demo.answers)} facts stated before the play it recalls {right}; the model without a "
            f"memory recalls {right_without}.",
        ]
    )


def answers_table(demo: BookDemo) -> str:
    """The answer to each question, a line each."""
    lines = [f"{'asked after the play':40} {'stated':10} {'with the memory':28} without"]
    for answer in demo.answers:
        marks = ["✓" if right else "✗" for right in answer.recalled]
        lines.append(
            f"{answer.fact.question + ' …':40} {answer.fact.answer:10} "
            f"{marks[0]} {answer.with_memory[:24]:26} {marks[1]} {answer.without[:24]}"
        )
    return "\n".join(lines)


def _changed(part: LossAt) -> str:
    change = percent(part).lstrip("+−")
    return f"{'lowered' if part.gain >= 0 else 'raised'} the loss by {change}"


def show(
    model: GraftedForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, minutes: float, folder: Path
) -> None:
    """Read for about so many minutes, and write FOLDER/report.html, a picture next to it, and the numbers.

    Raises:
        ValueError, OSError: if the play cannot be loaded or the folder cannot be written.
    """
    (play,) = (document for document in load_corpus(CORPUS) if document.name == PLAY)
    window = model.config.window
    say(f"\n{name} reads {TITLE} ({len(play.data):,} bytes) through a window of {window} tokens")
    demo = read_book(model, tokenizer, play.data, 60 * minutes)
    lines = verdict(demo, name, window)
    say(f"\n{table(demo.found)}\n\n{answers_table(demo)}")
    folder.mkdir(parents=True, exist_ok=True)
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}"
    title, about = f"{name} reads {TITLE}", f"{' '.join(lines.splitlines())} {machine}"
    write_page(folder / "report.html", demo.found, tokenizer, title=title, about=about)
    draw_graft_inspection(folder / "report.png", demo.found, title)
    numbers: dict[str, Any] = {
        "by_position": [asdict(part) for part in demo.found.by_position()],
        "whole": asdict(demo.found.whole()),
        "answers": [asdict(answer) for answer in demo.answers],
        "tokens_per_second": demo.tokens_per_second,
        "state_bytes": demo.state_bytes,
        "cache_bytes": demo.cache_bytes,
        "machine": machine,
    }
    (folder / "demo.json").write_text(json.dumps(numbers, indent=1))
    say(f"\nThe page, where every token has the colour of its gain: {folder / 'report.html'} ({machine})")
    say(lines)
