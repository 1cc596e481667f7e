"""Facts in haystacks, which the systems are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from titans.data.babi import KINDS
from titans.data.facts import make_facts
from titans.data.needles import TASKS, Needles, make_needles
from titans.evaluate.needle import Haystack

# Where facts stand, as shares of the haystack: at least half of it follows.
DEPTHS = (0.1, 0.3, 0.5)
NEEDLES = ("one", "two", "four", "values")
# Facts of `titans.data.facts`, whose names and values are held out, and whether their wordings are, too.
WORDINGS = {"known wordings": False, "new wordings": True}
FACTS = 4
HAYSTACKS = (*NEEDLES, *WORDINGS, *KINDS)
# Haystacks of a cell, by their length in tokens.
SAMPLES = {1024: 8, 4096: 4, 16384: 2, 65536: 1, 262144: 1}


class Question(NamedTuple):
    """task: what is counted together. prompt: ends where the answer follows. query: the question in it."""

    task: str
    prompt: str
    query: str
    answer: str


@dataclass(frozen=True)
class Asked:
    """A text (tokens,), and questions about it."""

    ids: Tensor
    questions: tuple[Question, ...]


class Placed(NamedTuple):
    """Statements in the order of the text, their depths, and questions as (task, question, answer)."""

    statements: list[str]
    depths: list[float]
    questions: list[tuple[str, str, str]]


def haystacks(tokenizer: Any, texts: Sequence[str], kind: str, length: int, seed: int) -> Iterator[Asked]:
    """Texts of `length` tokens with facts in them, cut from anywhere in the given texts in turn.

    kind: "one" number, word and passkey each in the words of RULER; "two" or "four" numbers and as many words
    that differ in name and value only; "values": a name with two numbers, both asked for in the order of the
    text; four facts in "known wordings" of training or "new wordings"; or a story's "qa1" to "qa3".
    """
    words = sorted({*re.findall(r"\b[a-z]{4,9}\b", " ".join(texts))}) if kind in WORDINGS else []
    hays = [Haystack(tokenizer, text) for text in texts]
    for sample in range(SAMPLES[length]):
        generator = np.random.default_rng([seed, HAYSTACKS.index(kind), length, sample])
        placed = _placed(kind, generator, sample, words)
        needles = [
            np.asarray(tokenizer.encode(f" {s.strip()}", add_special_tokens=False)) for s in placed.statements
        ]
        hay = hays[(seed + sample) % len(hays)]
        ids, _ = hay.hide(needles, placed.depths, length, int(generator.integers(len(hay.ids))))
        # Without the space at its end, which tokenizers make a part of the answer's first token.
        questions = [Question(task, f"\n{q.strip()}", q.strip(), a) for task, q, a in placed.questions]
        yield Asked(torch.from_numpy(ids.astype(np.int64)), tuple(questions))


def _placed(kind: str, generator: np.random.Generator, sample: int, words: list[str]) -> Placed:
    if kind == "one":
        tasks = ("number", "word", "passkey")
        tasks = tasks[sample % 3 :] + tasks[: sample % 3]
        found = [make_needles(TASKS[task], generator) for task in tasks]
        return Placed([n.statements[0] for n in found], [*DEPTHS], _questions(zip(tasks, found, strict=True)))
    if kind in WORDINGS:
        group = make_facts(generator, words, FACTS, held_out=True, held_out_wording=WORDINGS[kind])
        asked = [(kind, q.text[: q.begin], q.text[q.begin : q.end]) for q in group.questions]
        depths = np.sort(generator.uniform(DEPTHS[0], DEPTHS[-1], FACTS)).tolist()
        return Placed([statement.text for statement in group.statements], depths, asked)
    if kind in KINDS:
        pairs = [(kind, make_needles(TASKS[kind], generator))]
    elif kind == "values":
        pairs = [("values", make_needles(TASKS["number"], generator, num_values=2))]
    else:
        count = {"two": 2, "four": 4}[kind]
        pairs = [
            (task, make_needles(TASKS[task], generator, num_keys=count, num_questions=count))
            for task in ("number", "word")
        ]
    statements = [statement for _, needles in pairs for statement in needles.statements]
    depths = np.sort(generator.uniform(DEPTHS[0], DEPTHS[-1], len(statements))).tolist()
    if len(pairs) > 1:
        statements = [statements[i] for i in generator.permutation(len(statements))]
    return Placed(statements, depths, _questions(pairs))


def _questions(pairs: Any) -> list[tuple[str, str, str]]:
    found: list[tuple[str, Needles]] = list(pairs)
    return [
        (task, question, answer)
        for task, needles in found
        for question, answer in zip(needles.questions, needles.answers, strict=True)
    ]
