"""What the settings ask to insert into the training text: refrains, numbered lines, facts."""

from __future__ import annotations

import numpy as np

from titans.data import Document
from titans.data.batches import ANSWER, STATEMENT
from titans.data.needles import TextWithFacts, state_facts
from titans.data.numbered import with_numbered_lines
from titans.data.refrains import with_refrains
from titans.train.settings import FactSettings, TrainSettings


def are_none(facts: FactSettings) -> bool:
    """Whether the text stays unchanged."""
    return facts.spacing is None and not facts.refrains and not facts.numbered_lines


def with_insertions(
    document: Document, settings: TrainSettings, generator: np.random.Generator
) -> tuple[Document, np.ndarray | None]:
    """The document with refrains, numbered lines and facts inserted, as the settings ask for.

    Also, where the loss depends on it, a mark (`STATEMENT`, `ANSWER` or 0) for each byte of it.
    """
    facts = settings.facts
    text = with_refrains(document.data, generator, facts.refrains)
    changed = TextWithFacts(with_numbered_lines(text, generator, facts.numbered_lines), [], [])
    if facts.spacing is not None:
        changed = state_facts(
            changed.text, generator, facts.spacing, farthest=facts.distance, alike=facts.alike
        )
    marks = None
    if (facts.answer_weight != 1 or facts.write_cost) and settings.tokenizer == "bytes":
        marks = np.zeros(len(changed.text), dtype=np.uint8)
        for spans, mark in ((changed.statements, STATEMENT), (changed.answers, ANSWER)):
            for begin, end in spans:
                marks[begin:end] = mark
    return Document(document.name, changed.text), marks
