"""Short stories of who went where with what, after bAbI's tasks 1 to 3: facts for a long text. Seeded.

Results are not comparable with those published for bAbI. Tests use bAbI's words. Training uses other words,
drawn anew for every story, because a model memorises a short list. Its places and things are made up: words
of the text would teach a memory to write every word (docs/how/recall.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Kind = Literal["qa1", "qa2", "qa3"]
KINDS: tuple[Kind, ...] = ("qa1", "qa2", "qa3")


@dataclass(frozen=True)
class Phrases:
    """Verbs for moving, taking and dropping, and questions that end where the answer follows.

    The questions ask where {who} is, where {thing} is, and where {thing} was before it came to {place}.
    """

    moves: tuple[str, ...]
    takes: tuple[str, ...]
    drops: tuple[str, ...]
    where_is_who: tuple[str, ...]
    where_is_thing: tuple[str, ...]
    where_was_thing: tuple[str, ...]


@dataclass(frozen=True)
class World:
    """The people, places and things of a story, and the phrases that describe it."""

    people: tuple[str, ...]
    places: tuple[str, ...]
    things: tuple[str, ...]
    phrases: Phrases


TEST_WORLD = World(
    ("Mary", "John", "Daniel", "Sandra"),
    ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office"),
    ("apple", "football", "milk"),
    Phrases(
        ("went to", "journeyed to", "travelled to", "moved to"),
        ("grabbed", "took", "got", "picked up"),
        ("dropped", "left", "put down"),
        ("Where is {who}? {who} is in the ",),
        ("Where is the {thing}? The {thing} is in the ",),
        ("Where was the {thing} before the {place}? The {thing} was in the ",),
    ),
)
_TRAINING_PEOPLE = (
    "Anna", "Peter", "Lucas", "Helen", "Oscar", "Clara", "Victor", "Nora", "Edgar", "Marta", "Simon", "Greta",
    "Felix", "Ruth", "Hugo", "Irene", "Conrad", "Paula", "Martin", "Agnes", "Leo", "Vera", "Robert", "Judith",
)  # fmt: skip
_TRAINING_PHRASES = Phrases(
    ("walked to", "ran to", "came to", "hurried to", "rode to", "returned to", "fled to", "set out for",
     "crept into", "stepped into", "was sent to", "made for"),
    ("seized", "found", "lifted", "fetched", "snatched", "took hold of", "carried off"),
    ("threw away", "laid down", "lost", "set down", "let go of", "gave up"),
    (
        "Where has {who} gone? {who} is now in the ", "Who has seen {who}? {who} stands in the ",
        "Look for {who}. {who} waits at the ", "And {who}? {who} must be at the ", "{who} is at the ",
        "Tell us where {who} may be. {who} sits in the ",
    ),
    (
        "Who has the {thing}? The {thing} lies in the ", "Look for the {thing}. The {thing} must be at the ",
        "And the {thing}? The {thing} is now in the ", "The {thing} is at the ",
    ),
    (
        "Before the {place}, where did the {thing} lie? The {thing} lay in the ",
        "The {thing} has not always been at the {place}. First the {thing} was at the ",
    ),
)  # fmt: skip


def training_world(generator: np.random.Generator, names: Sequence[str]) -> World:
    """A world of eight people, ten places and seven things; places and things take distinct `names`.

    Raises:
        ValueError: for fewer than seventeen names.
    """
    if len(names) < 17:
        raise ValueError(f"names: {len(names)} given; give at least 17")
    chosen = tuple(names[i] for i in generator.choice(len(names), 17, replace=False))
    people = generator.choice(len(_TRAINING_PEOPLE), 8, replace=False)
    return World(tuple(_TRAINING_PEOPLE[i] for i in people), chosen[:10], chosen[10:], _TRAINING_PHRASES)


@dataclass(frozen=True)
class Story:
    """Facts in order, a question about them, and its answer, which is a place."""

    facts: tuple[str, ...]
    question: str
    answer: str


@dataclass
class _Course:
    """The state of a story: where each person is, who holds what, and where each thing has been."""

    world: World
    generator: np.random.Generator
    facts: list[str] = field(default_factory=list)
    place_of: dict[str, str] = field(default_factory=dict)
    holder_of: dict[str, str] = field(default_factory=dict)
    places_of: dict[str, list[str]] = field(default_factory=dict)

    def pick(self, options: tuple[str, ...] | list[str]) -> str:
        return options[int(self.generator.integers(len(options)))]

    def go(self) -> None:
        who = self.pick(self.world.people)
        where = self.pick([place for place in self.world.places if place != self.place_of.get(who)])
        self.place_of[who] = where
        for thing, holder in self.holder_of.items():
            if holder == who:
                self.places_of[thing].append(where)
        self.facts.append(f"{who} {self.pick(self.world.phrases.moves)} the {where}. ")

    def take(self) -> None:
        """A person picks up a thing that nobody holds and that is not known to lie elsewhere."""
        free = [
            (who, thing)
            for who, where in self.place_of.items()
            for thing in self.world.things
            if thing not in self.holder_of and self.places_of.get(thing, [where])[-1] == where
        ]
        if not free:
            return self.go()
        who, thing = free[int(self.generator.integers(len(free)))]
        self.holder_of[thing] = who
        self.places_of.setdefault(thing, [self.place_of[who]])
        self.facts.append(f"{who} {self.pick(self.world.phrases.takes)} the {thing}. ")

    def drop(self) -> None:
        if not self.holder_of:
            return self.take()
        thing = self.pick(list(self.holder_of))
        who = self.holder_of.pop(thing)
        self.facts.append(f"{who} {self.pick(self.world.phrases.drops)} the {thing}. ")


def make_story(generator: np.random.Generator, kind: Kind, world: World, num_facts: int = 8) -> Story:
    """A story and a question that its facts answer.

    qa1: where is a person? (one fact) qa2: where is a thing? (two) qa3: where was it before? (three)

    Raises:
        ValueError: for fewer than four facts, which leave qa3 nothing to ask.
    """
    if num_facts < 4:
        raise ValueError(f"num_facts={num_facts}: give at least 4")
    while True:
        course = _Course(world, generator)
        for _ in range(num_facts):
            acts = [course.go] if kind == "qa1" else [course.go, course.go, course.take, course.drop]
            acts[int(generator.integers(len(acts)))]()
        found = _question(course, kind)
        if found is not None:
            return Story(tuple(course.facts), *found)


def _question(course: _Course, kind: Kind) -> tuple[str, str] | None:
    phrases = course.world.phrases
    if kind == "qa1":
        who = course.pick(list(course.place_of))
        return course.pick(phrases.where_is_who).format(who=who), course.place_of[who]
    moved = [thing for thing, places in course.places_of.items() if len(places) > (kind == "qa3")]
    if not moved:
        return None
    thing = course.pick(moved)
    places = course.places_of[thing]
    if kind == "qa2":
        return course.pick(phrases.where_is_thing).format(thing=thing), places[-1]
    question = course.pick(phrases.where_was_thing).format(thing=thing, place=places[-1])
    return question, places[-2]
