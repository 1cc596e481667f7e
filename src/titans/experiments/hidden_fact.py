"""Hide a fact at the beginning of a long text, read on, and ask for it on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from titans.data.needles import TASKS, make_needles
from titans.evaluate.ask import is_answer
from titans.stream import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from titans.hf import TitansForCausalLM

# Bytes of text before the fact.
_BEFORE = 1000


class Reply(NamedTuple):
    """What the model answered with so many bytes between the fact and the question."""

    num_bytes: int
    answer: str


@dataclass(frozen=True)
class HiddenFact:
    """What was hidden and asked, the right answer, the replies in order, seconds, and bytes of state."""

    statement: str
    question: str
    answer: str
    replies: tuple[Reply, ...]
    seconds: float
    state_bytes: int

    def is_right(self, reply: Reply) -> bool:
        return is_answer(reply.answer, self.answer)


def hide_and_ask(
    model: TitansForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: bytes,
    distances: Sequence[int],
    task: str = "number",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> HiddenFact:
    """Insert a fact near the beginning of the text, read on, and have the model answer on the way.

    Args:
        distances: bytes from the fact to each question, ascending. The reader itself never sees a question.
        progress: called with the number of bytes read.
    """
    needles = make_needles(TASKS[task], np.random.default_rng(seed))
    (statement,), (question,), (answer,) = needles.statements, needles.questions, needles.answers
    at = text.index(b" ", _BEFORE) + 1
    session, began = Session(model, tokenizer), time.perf_counter()
    session.feed(text[:at] + statement.encode())
    replies, place = [], at
    for distance in distances:
        read = place - at
        session.feed(
            text[place : at + distance],
            progress=None if progress is None else lambda taken, read=read: progress(read + taken),
        )
        place = at + distance
        asked = session.fork()
        asked.feed(question)
        answered = asked.generate(max_new_tokens=len(answer) + 1, do_sample=False)
        assert isinstance(answered, str)
        replies.append(Reply(distance, answered))
    seconds, size = time.perf_counter() - began, session.stats().state_bytes
    return HiddenFact(statement.strip(), question.strip(), answer, tuple(replies), seconds, size)
