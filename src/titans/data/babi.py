"""Little stories of who went where with what, after bAbI's tasks 1 to 3: facts for a long text. Seeded.

Like bAbI, not bAbI: results are not comparable with those published for it. A test's people, places and
things are bAbI's; those of training are others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Kind = Literal["qa1", "qa2", "qa3"]
KINDS: tuple[Kind, ...] = ("qa1", "qa2", "qa3")


@dataclass(frozen=True)
class World:
    """Who there is, where they go, and what they carry."""

    people: tuple[str, ...]
    places: tuple[str, ...]
    things: tuple[str, ...]


TEST_WORLD = World(
    ("Mary", "John", "Daniel", "Sandra"),
    ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office"),
    ("apple", "football", "milk"),
)
TRAINING_WORLD = World(
    ("Anna", "Peter", "Lucas", "Helen", "Oscar", "Clara", "Victor", "Nora"),
    ("castle", "forest", "harbour", "market", "stable", "temple", "tower", "cellar", "bridge", "meadow"),
    ("sword", "candle", "basket", "ring", "loaf", "lantern", "scroll"),
)
_MOVES = ("went to", "journeyed to", "travelled to", "moved to")
_TAKES = ("grabbed", "took", "got", "picked up")
_DROPS = ("dropped", "left", "put down")


@dataclass(frozen=True)
class Story:
    """Facts in their order, a question, and its answer: a place."""

    facts: tuple[str, ...]
    question: str
    answer: str


@dataclass
class _Telling:
    """A story while it is told: where everybody is, who holds what, and where each thing has been."""

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
        self.facts.append(f"{who} {self.pick(_MOVES)} the {where}. ")

    def take(self) -> None:
        """Somebody picks up a thing that nobody holds, and that is not known to lie elsewhere."""
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
        self.facts.append(f"{who} {self.pick(_TAKES)} the {thing}. ")

    def drop(self) -> None:
        if not self.holder_of:
            return self.take()
        thing = self.pick(list(self.holder_of))
        who = self.holder_of.pop(thing)
        self.facts.append(f"{who} {self.pick(_DROPS)} the {thing}. ")


def tell_story(generator: np.random.Generator, kind: Kind, world: World, num_facts: int = 8) -> Story:
    """A story that its question can be answered from.

    qa1: where is a person? (one fact) qa2: where is a thing? (two) qa3: where was it before? (three)

    Raises:
        ValueError: for fewer than four facts, which leave qa3 nothing to ask.
    """
    if num_facts < 4:
        raise ValueError(f"num_facts={num_facts}: give at least 4")
    while True:
        telling = _Telling(world, generator)
        for _ in range(num_facts):
            acts = [telling.go] if kind == "qa1" else [telling.go, telling.go, telling.take, telling.drop]
            acts[int(generator.integers(len(acts)))]()
        found = _question(telling, kind)
        if found is not None:
            return Story(tuple(telling.facts), *found)


def _question(telling: _Telling, kind: Kind) -> tuple[str, str] | None:
    if kind == "qa1":
        who = telling.pick(list(telling.place_of))
        return f"Where is {who}? {who} is in the ", telling.place_of[who]
    moved = [thing for thing, places in telling.places_of.items() if len(places) > (kind == "qa3")]
    if not moved:
        return None
    thing = telling.pick(moved)
    places = telling.places_of[thing]
    if kind == "qa2":
        return f"Where is the {thing}? The {thing} is in the ", places[-1]
    question = f"Where was the {thing} before the {places[-1]}? The {thing} was in the "
    return question, places[-2]
