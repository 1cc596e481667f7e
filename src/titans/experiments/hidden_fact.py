"""Hide a fact at the beginning of a long text, read all of it, and ask."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from titans.data.needles import TASKS, make_needles
from titans.stream import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from titans.hf import TitansForCausalLM

# Behind so much text, the fact is said.
_BEFORE = 1000


@dataclass(frozen=True)
class HiddenFact:
    """What was hidden, asked, answered and told; bytes read after the fact, seconds, and bytes of state."""

    statement: str
    question: str
    answer: str
    told: str
    num_bytes: int
    seconds: float
    state_bytes: int

    @property
    def is_right(self) -> bool:
        return self.told.strip().startswith(self.answer)


def hide_and_ask(
    model: TitansForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    text: bytes,
    task: str = "number",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> HiddenFact:
    """Say a fact of a task near the text's beginning, read on to its end, and have the model answer.

    progress: called with the number of bytes read.
    """
    needles = make_needles(TASKS[task], np.random.default_rng(seed))
    (statement,), (question,), (answer,) = needles.statements, needles.questions, needles.answers
    at = text.index(b" ", _BEFORE) + 1
    session, began = Session(model, tokenizer), time.perf_counter()
    session.feed(text[:at] + statement.encode() + text[at:], progress=progress)
    session.feed(question)
    told = session.generate(max_new_tokens=len(answer) + 1, do_sample=False)
    assert isinstance(told, str)
    return HiddenFact(
        statement.strip(),
        question.strip(),
        answer,
        told,
        len(text) - at,
        time.perf_counter() - began,
        session.stats().state_bytes,
    )
