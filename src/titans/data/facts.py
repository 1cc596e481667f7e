"""Facts from a grammar: (name, relation, value), statements of them, and questions. Seeded.

The grammar (`titans.data.facts_grammar`) is wide, so that a model has to recognise facts in general. Held-out
facts share no name and no value with training; held-out wordings share no part of a sentence either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from titans.data.facts_grammar import FIRST_NAMES, MONTHS, TEST, TRAINING, Parts
from titans.data.needles import digits, from_half, pseudo_word

# Shares of the groups whose facts are stated alike, and of those about one name.
_ALIKE, _ONE_NAME = 0.7, 0.1
_NAMELESS, _SAME_CLAUSE, _VERB = 0.15, 0.6, 0.15
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


@dataclass(frozen=True)
class Fact:
    """A value that belongs to a name under a relation; the name may be empty."""

    name: str
    relation: str
    value: str


@dataclass(frozen=True)
class Sentence:
    """Text that states or asks for a fact and gives its value, at text[begin:end]; one character follows."""

    text: str
    begin: int
    end: int


@dataclass(frozen=True)
class Chat:
    """What stands before a user's words, between them and the answer, and after the answer."""

    before: str
    between: str
    after: str


@dataclass(frozen=True)
class FactGroup:
    """Facts that are stated in one place.

    kind: "alike" (one wording, several names), "one name" (several relations of one name) or "mixed".
    statements: one for each fact. questions: likewise; each ends with the answer.
    """

    kind: str
    facts: tuple[Fact, ...]
    statements: tuple[Sentence, ...]
    questions: tuple[Sentence, ...]


@dataclass(frozen=True)
class _Wording:
    """A statement's and a question's form, for any name and value of a relation."""

    statement: str
    question: str
    # After the answer; what a chat closes its turns with.
    closing: str


def make_facts(
    generator: np.random.Generator,
    words: Sequence[str],
    count: int,
    *,
    held_out: bool = False,
    held_out_wording: bool = False,
    chat: Chat | None = None,
) -> FactGroup:
    """Facts, each with a statement and a question; 7 of 10 groups are alike, 1 of 10 is about one name.

    Args:
        words: of which names and values are made, as well as of made-up words, first names, digits and
            dates; at least a hundred different ones.
        count: facts, at least 1.
        held_out: draw names and values from the half that is reserved for tests.
        held_out_wording: make sentences of the parts that are reserved for tests.
        chat: with it, one question in four is a turn of a conversation.

    Raises:
        ValueError: for fewer words or a smaller count.
    """
    if len(set(words)) < 100:
        raise ValueError(f"words has {len(set(words))} different words: give at least 100")
    if count < 1:
        raise ValueError(f"count={count}: give at least 1")
    draws = _Draws(generator, words, held_out, TEST if held_out_wording else TRAINING, chat)
    kind = str(
        generator.choice(["alike", "one name", "mixed"], p=[_ALIKE, _ONE_NAME, 1 - _ALIKE - _ONE_NAME])
    )
    names: list[str] = []
    relations: list[tuple[str, str]] = []
    while len(names) < count:
        name = names[0] if kind == "one name" and names else draws.name()
        relation = relations[0] if kind == "alike" and relations else draws.relation()
        known = [relation for relation, _ in relations]
        if (name not in names or kind == "one name") and (relation[0] not in known or kind == "alike"):
            names.append(name)
            relations.append(relation)
    shared = draws.wording(named=True)
    facts, statements, questions = [], [], []
    for name, (relation, value_kind) in zip(names, relations, strict=True):
        wording, value = shared, draws.value(value_kind)
        if kind == "mixed":
            name = "" if generator.random() < _NAMELESS else name
            wording = draws.wording(named=bool(name))
        fact = Fact(name, relation, value)
        facts.append(fact)
        statements.append(_filled(wording.statement, fact))
        questions.append(_filled(wording.question, fact, wording.closing))
    return FactGroup(kind, tuple(facts), tuple(statements), tuple(questions))


def _filled(form: str, fact: Fact, closing: str = "") -> Sentence:
    before, after = form.split("{value}")
    before = before.format(name=fact.name, relation=fact.relation)
    return Sentence(before + fact.value + after + closing, len(before), len(before) + len(fact.value))


class _Draws:
    """Draws of everything that a fact consists of."""

    def __init__(
        self,
        generator: np.random.Generator,
        words: Sequence[str],
        held_out: bool,
        parts: Parts,
        chat: Chat | None,
    ) -> None:
        self.generator, self.words, self.held_out = generator, words, held_out
        self.parts, self.chat = parts, chat

    def _pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.generator.integers(len(options)))]

    def _chance(self, share: float) -> bool:
        return bool(self.generator.random() < share)

    def _from(self, options: Sequence[str]) -> str:
        return from_half(lambda: self._pick(options), self.held_out)

    def _first_name(self) -> str:
        # Which half it is in is decided by its small letters, as for a made-up name that is spelt alike.
        return from_half(lambda: self._pick(FIRST_NAMES).lower(), self.held_out).capitalize()

    def _made_up(self) -> str:
        return pseudo_word(self.generator, self.held_out, int(self.generator.integers(2, 5)))

    def name(self) -> str:
        """One or two words: common, made up, or a first name."""
        kind = self.generator.integers(7)
        if kind == 0:
            return self._first_name()
        if kind == 1:
            return f"{self._first_name()} {self._made_up().capitalize()}"
        if kind == 2:
            return self._made_up()
        if kind == 3:
            return self._made_up().capitalize()
        if kind == 4:
            return self._from(self.words)
        joint = "-" if kind == 5 else " "
        return self._from(self.words) + joint + self._from(self.words)

    def relation(self) -> tuple[str, str]:
        """A relation, and the kind of its values here."""
        relation, kinds = self._pick(self.parts.relations)
        return relation, self._pick(kinds)

    def value(self, kind: str) -> str:
        draw = {
            "number": lambda: digits(int(self.generator.integers(4, 9)))(self.generator, self.held_out),
            "code": lambda: from_half(self._code, self.held_out),
            "word": lambda: self._from(self.words),
            "two words": lambda: f"{self._from(self.words)} {self._from(self.words)}",
            "made-up": self._made_up,
            "place": lambda: self._made_up().capitalize(),
            "person": lambda: f"{self._first_name()} {self._made_up().capitalize()}",
            "date": lambda: from_half(self._date, self.held_out),
        }
        return draw[kind]()

    def _code(self) -> str:
        letters = "".join(self._pick(_LETTERS) for _ in range(self.generator.integers(1, 4)))
        number = "".join(map(str, self.generator.integers(10, size=int(self.generator.integers(3, 6)))))
        return letters + self._pick(("-", "", " ")) + number

    def _date(self) -> str:
        month, day = int(self.generator.integers(1, 13)), int(self.generator.integers(1, 29))
        year = int(self.generator.integers(1500, 2100))
        forms = (
            f"{day} {MONTHS[month - 1]} {year}",
            f"{MONTHS[month - 1]} {day}, {year}",
            f"{year}-{month:02}-{day:02}",
        )
        return self._pick(forms)

    def wording(self, named: bool) -> _Wording:
        parts = self.parts
        subject = self._pick(parts.subjects if named else parts.nameless)
        clause = subject + self._pick(parts.links)
        stated = self._pick(parts.verbs) if named and self._chance(_VERB) else clause
        statement = _sentence(self._pick(parts.leads) + stated) + "{value}." + self._pick(parts.tails)
        if self.chat is not None and self._chance(0.25):
            opening = self._pick([opening for opening in parts.openings if opening])
            asked = _sentence(opening.format(subject=subject).strip())
            # A value at the very beginning of a turn often has other tokens than after a space.
            cue = "" if self._chance(0.2) else _sentence(clause)
            question = self.chat.before + asked + self.chat.between + cue + "{value}."
            return _Wording(statement, question, self.chat.after)
        opening = self._pick(parts.openings)
        # The answer in the statement's words, in other words of the same relation, or in hardly any.
        choice = self.generator.random()
        if choice < _SAME_CLAUSE or not opening:
            cue = _sentence(clause)
        elif choice < (1 + _SAME_CLAUSE) / 2:
            cue = _sentence(self._pick(parts.subjects if named else parts.nameless) + self._pick(parts.links))
        else:
            cue = self._pick(parts.cues)
        return _Wording(statement, _sentence(opening.format(subject=subject)) + cue + "{value}.", "")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
