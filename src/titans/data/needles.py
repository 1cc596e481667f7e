"""Facts stated once in a long text and asked for later: needles in a haystack, after RULER. Seeded.

Tests and training share nothing. Their sentences and nouns differ, and names and values are drawn from two
disjoint halves. The caller chooses haystacks that differ too.
"""

from __future__ import annotations

import re
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from titans.data.babi import KINDS, TEST_WORLD, Kind, make_story, training_world

Draw = Callable[[np.random.Generator, bool], str]
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_CONSONANTS, _VOWELS = "bdfghklmnprstvz", "aeiou"
_STORIES = 0.2
_WORDS_FROM = 2**20
# Made-up names for the places and things in the stories of one text.
_NAMES = 512
# At most so many facts share their words, and at most so many bytes lie between two of them.
_MOST_ALIKE, _LONGEST_GAP = 5, 1000
# One draw in so many is reserved for tests.
_HELD_OUT_IN = 4


@dataclass(frozen=True)
class Wording:
    """A statement with {name} and {value}, and a question with {name} that ends where the value follows."""

    statement: str
    question: str


@dataclass(frozen=True)
class NeedleTask:
    """What is inserted and how it is asked for: values of names, or the facts of a story.

    haystack: "filler" (five sentences, repeated) or "text". source: a wording and a function that draws its
    values, or the kind of a story.
    """

    haystack: str
    source: tuple[Wording, Draw] | Kind

    @property
    def is_story(self) -> bool:
        """Whether the needle is a story: many statements whose order matters."""
        return isinstance(self.source, str)


@dataclass(frozen=True)
class Needles:
    """Statements in the order of the text, the questions at its end, and the expected answers."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def pseudo_word(generator: np.random.Generator, held_out: bool, syllables: int = 3) -> str:
    """A made-up word such as "tomirena": a name or a value that no model has memorised."""

    def draw() -> str:
        letters = [
            (_CONSONANTS[generator.integers(15)], _VOWELS[generator.integers(5)]) for _ in range(syllables)
        ]
        return "".join(map("".join, letters))

    return from_half(draw, held_out)


def digits(count: int) -> Draw:
    """Draws numbers of `count` digits."""
    return lambda generator, held_out: from_half(
        lambda: "".join(map(str, generator.integers(10, size=count))), held_out
    )


def random_uuid(generator: np.random.Generator, held_out: bool) -> str:
    """Thirty-two hexadecimal digits in five groups."""
    return from_half(lambda: str(uuid.UUID(bytes=generator.bytes(16), version=4)), held_out)


def from_half(draw: Callable[[], str], held_out: bool) -> str:
    """The first draw of the half that is reserved for tests, or else of the other."""
    while True:
        found = draw()
        if (zlib.crc32(found.encode()) % _HELD_OUT_IN == 0) == held_out:
            return found


def _magic(kind: str) -> Wording:
    return Wording(
        f"One of the special magic {kind}s for {{name}} is: {{value}}. ",
        f"What is the special magic {kind} for {{name}}? The special magic {kind} for {{name}} is: ",
    )


# Stories follow bAbI's tasks 1 to 3: where is a person, where is a thing, and where was it before?
TASKS: dict[str, NeedleTask] = {
    "passkey": NeedleTask(
        "filler",
        (
            Wording("The pass key is {value}. Remember it. ", "What is the pass key? The pass key is "),
            digits(5),
        ),
    ),
    "number": NeedleTask("text", (_magic("number"), digits(7))),
    "word": NeedleTask("text", (_magic("word"), pseudo_word)),
    "uuid": NeedleTask("text", (_magic("uuid"), random_uuid)),
    **{kind: NeedleTask("text", kind) for kind in KINDS},
}


class TextWithFacts(NamedTuple):
    """A text with inserted facts, and (begin, end) in bytes of every answer and of every statement.

    The full stop after an answer is part of it, because the end of a value has to be recalled too.
    """

    text: bytes
    answers: list[tuple[int, int]]
    statements: list[tuple[int, int]]


# The wordings of training: "Mark this, the seal of {name} = {value}. " and "What is the seal of {name}? The
# seal of {name} = ". The plainest wording is the most common, so that a model has to recognise facts by their
# values and not by their words.
LEADS = ("", "", "", "Note: ", "Mark this, ", "They say ", "We read that ", "Hear me, ", "By the book, ")
SUBJECTS = (
    "the {thing} of {name}", "the {thing} for {name}", "{name}'s {thing}", "the {name} {thing}",
    "{thing} {name}", "the {thing} {name} has", "the {thing} that is {name}'s", "[{name}] {thing}",
    "{name}, {thing}", *4 * ("the {thing}",), "{name}",
)  # fmt: skip
LINKS = (
    *3 * (" was ",), *4 * (" is ",), " is: ", ": ", " = ", " -> ", " equals ", " became ", " means ",
    ", namely ", " has been ", " reads ", "/", " (", " shall be ", " are: ",
)  # fmt: skip
# Nouns of training facts are words of the text itself, so that no noun marks a fact. These are reserved for
# tests.
TEST_NOUNS = frozenset(
    {"magic", "special", "pass", "key", "number", "numbers", "word", "words", "uuid", "uuids"}
    | {*TEST_WORLD.places, *TEST_WORLD.things}
)


def make_needles(
    task: NeedleTask,
    generator: np.random.Generator,
    num_keys: int = 1,
    num_values: int = 1,
    num_questions: int = 1,
) -> Needles:
    """A test's needles.

    Args:
        num_keys: names about which a fact is stated; those not asked for are distractors.
        num_values: statements about each name; the answer lists all values in the order of the text.
        num_questions: names asked for.

    Raises:
        ValueError: for more questions than names, or several names where the task has none.
    """
    if isinstance(task.source, str):
        if num_keys * num_values * num_questions > 1:
            raise ValueError("num_keys, num_values, num_questions: a story has one question; leave them at 1")
        story = make_story(generator, task.source, TEST_WORLD)
        return Needles(story.facts, (story.question,), (story.answer,))
    wording, draw = task.source
    if num_questions > num_keys:
        raise ValueError(f"num_questions={num_questions}: give at most num_keys={num_keys}")
    if num_keys > 1 and "{name}" not in wording.statement:
        raise ValueError(f"num_keys={num_keys}: this task has no names; give 1, or choose another task")
    names: list[str] = []
    while len(names) < num_keys:
        name = pseudo_word(generator, True)
        if name not in names:
            names.append(name)
    facts = [(name, draw(generator, True)) for name in names for _ in range(num_values)]
    facts = [facts[i] for i in generator.permutation(len(facts))]
    asked = [names[i] for i in generator.permutation(num_keys)[:num_questions]]
    return Needles(
        tuple(wording.statement.format(name=name, value=value) for name, value in facts),
        tuple(wording.question.format(name=name) for name in asked),
        tuple(", ".join(value for of, value in facts if of == name) for name in asked),
    )


def state_facts(
    text: bytes,
    generator: np.random.Generator,
    spacing: float,
    nearest: int = 32,
    farthest: int = 256,
    questions: int = 3,
    alike: float = 0.0,
) -> TextWithFacts:
    """The text with facts stated in it, each asked for and answered several times.

    Args:
        text: any text; insertions stand at spaces only.
        spacing: mean distance in bytes from one fact to the next.
        nearest, farthest: distance in bytes from a fact to its questions, log-uniform.
        questions: number of questions about each fact; the facts of a group share them, each at least one.
        alike: share of the facts about a name that begin a group of 2 to 5 facts in the same words, which
            differ in name and value only.

    One fact in five is a story of `titans.data.babi`, spread over the distance and asked about once.
    """
    inserted: list[tuple[int, str, str]] = []
    words = words_of(text)
    names = sorted({pseudo_word(generator, False) for _ in range(_NAMES)})
    story_ends = 0
    for at in _moments(generator, len(text), spacing):
        gaps = np.exp(generator.uniform(np.log(nearest), np.log(farthest), questions)).astype(int)
        # Stories share their people, so they must not overlap.
        if at >= story_ends and generator.random() < _STORIES:
            story_ends = at + int(gaps[0])
            kind = KINDS[generator.integers(len(KINDS))]
            world = training_world(generator, names)
            story = make_story(generator, kind, world, int(generator.integers(4, 9)))
            places = np.sort(generator.integers(at, story_ends, len(story.facts))).tolist()
            inserted += [(place, fact, "") for place, fact in zip(places, story.facts, strict=True)]
            inserted.append((story_ends, story.question, story.answer))
        else:
            facts = _facts(generator, words, alike)
            times = max(questions // len(facts), 1)
            for statement, asked, value in facts:
                inserted += [(at, statement, ""), *((at + int(gap), asked, value) for gap in gaps[:times])]
                if len(facts) > 1:
                    at += int(np.exp(generator.uniform(0, np.log(_LONGEST_GAP))))
                    gaps = np.exp(generator.uniform(np.log(nearest), np.log(farthest), times)).astype(int)
    found, answers, statements, last = bytearray(), [], [], 0
    for at, sentence, answer in sorted(inserted, key=lambda one: one[0]):
        if at >= len(text):
            break
        place = max(text.find(b" ", at) + 1, last)
        found += text[last:place]
        begin = len(found)
        found += sentence.encode()
        if answer:
            answers.append((len(found), len(found) + len(answer) + 1))
            found += answer.encode() + b". "
        else:
            statements.append((begin, len(found)))
        last = place
    return TextWithFacts(bytes(found + text[last:]), answers, statements)


def _moments(generator: np.random.Generator, length: int, spacing: float) -> Iterator[int]:
    at = 0.0
    while (at := at + generator.exponential(spacing)) < length:
        yield int(at)


def words_of(text: bytes) -> list[str]:
    """Words of the text that may serve as nouns of facts, each as often as it occurs."""
    words = re.findall(r"\b[a-z]{4,9}\b", text[:_WORDS_FROM].decode("utf-8", "replace"))
    return [word for word in words if word not in TEST_NOUNS] or ["thing"]


def _facts(generator: np.random.Generator, words: list[str], alike: float) -> list[tuple[str, str, str]]:
    """Statement, question and answer of a fact, or of several in the same words."""

    def pick(options: tuple[str, ...] | list[str]) -> str:
        return options[int(generator.integers(len(options)))]

    def draw_name() -> str:
        return pseudo_word(generator, False, int(generator.integers(2, 5)))

    name = draw_name()
    thing = " ".join(pick(words) for _ in range(generator.integers(1, 4)))
    subject, link, kind = pick(SUBJECTS), pick(LINKS), generator.random()
    draw: Draw = random_uuid
    if kind < 0.45:
        draw = digits(int(generator.integers(3, 9)))
    elif kind < 0.9:
        draw = partial(pseudo_word, syllables=int(generator.integers(2, 6)))
    pairs = [(name, draw(generator, False))]
    opening = pick(("What is {}? ", "Again: ", "", "", "Do you know {}? "))
    lead = pick(LEADS)
    if alike and "{name}" in subject and generator.random() < alike:
        others = int(generator.integers(1, _MOST_ALIKE))
        pairs += [(draw_name(), draw(generator, False)) for _ in range(others)]
    facts = []
    for name, value in pairs:
        of = subject.format(thing=thing, name=name)
        question = _sentence(opening.format(of) + _sentence(of) + link)
        facts.append((_sentence(lead + of + link) + value + ". ", question, value))
    return facts


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
