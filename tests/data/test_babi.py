"""A reader of the stories' sentences alone finds the answers."""

from __future__ import annotations

import numpy as np
import pytest

from titans.data.babi import KINDS, TEST_WORLD, make_story, training_world

NAMES = [f"{first}{last}" for first in "bdgklm" for last in ("arn", "ower", "ield", "oat")]
TRAINING_WORLD = training_world(np.random.default_rng(0), NAMES)


def answer_from(world, facts, question):
    """Where things have been, from the sentences alone."""
    place, holder, seen = {}, {}, {}
    for fact in facts:
        who, verb = fact.strip(". ").split(" the ")[0].split(" ", 1)
        last = fact.strip(". ").split()[-1]
        if verb in world.phrases.moves:
            place[who] = last
            for thing in (t for t, h in holder.items() if h == who):
                seen[thing].append(last)
        elif verb in world.phrases.drops:
            assert holder.pop(last) == who, "dropped what was not held"
        else:
            assert verb in world.phrases.takes and last not in holder, "took what somebody holds"
            holder[last] = who
            if last in seen:
                assert seen[last][-1] == place[who], "took what lies elsewhere"
            seen.setdefault(last, [place[who]])
    words = set(question.replace("?", "").replace(".", "").replace(",", "").split())
    if who := words & set(world.people):
        return place[who.pop()]
    (thing,) = words & set(world.things)
    (after,) = words & set(world.places) or [None]
    if after is None:
        return seen[thing][-1]
    assert seen[thing][-1] == after
    return seen[thing][-2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [TEST_WORLD, TRAINING_WORLD])
def test_a_reader_of_the_sentences_finds_the_answer(kind, world):
    answers = set()
    for seed in range(200):
        story = make_story(np.random.default_rng(seed), kind, world, num_facts=10)
        assert story == make_story(np.random.default_rng(seed), kind, world, num_facts=10)
        assert len(story.facts) >= 10 and all(fact.endswith(". ") for fact in story.facts)
        assert answer_from(world, story.facts, story.question) == story.answer
        answers.add(story.answer)
    assert answers == set(world.places)


def test_the_worlds_share_nothing_and_a_story_needs_facts_and_names():
    words = [
        set().union(world.people, world.places, world.things, *vars(world.phrases).values())
        for world in (TEST_WORLD, TRAINING_WORLD)
    ]
    assert not words[0] & words[1]
    assert TRAINING_WORLD.places != training_world(np.random.default_rng(1), NAMES).places
    with pytest.raises(ValueError, match="num_facts=3: give at least 4"):
        make_story(np.random.default_rng(0), "qa1", TEST_WORLD, 3)
    with pytest.raises(ValueError, match="names: 16 given"):
        training_world(np.random.default_rng(0), NAMES[:16])
