"""The stories, told again by someone who only reads their sentences."""

from __future__ import annotations

import numpy as np
import pytest

from titans.data.babi import KINDS, TEST_WORLD, TRAINING_WORLD, tell_story


def answer_from(facts, question):
    """Where things have been, from the sentences alone."""
    place, holder, seen = {}, {}, {}
    for fact in facts:
        words = fact.strip(". ").split()
        who, last = words[0], words[-1]
        if last in (*TEST_WORLD.places, *TRAINING_WORLD.places):
            place[who] = last
            for thing in (t for t, h in holder.items() if h == who):
                seen[thing].append(last)
        elif words[1] in ("dropped", "left", "put"):
            assert holder.pop(last) == who, "dropped what was not held"
        else:
            assert last not in holder, "took what somebody holds"
            holder[last] = who
            if last in seen:
                assert seen[last][-1] == place[who], "took what lies elsewhere"
            seen.setdefault(last, [place[who]])
    words = question.replace("?", "").split()
    if words[2] != "the":
        return place[words[2]]
    if "before" not in question:
        return seen[words[3]][-1]
    assert seen[words[3]][-1] == words[6]
    return seen[words[3]][-2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [TEST_WORLD, TRAINING_WORLD])
def test_a_reader_of_the_sentences_finds_the_answer(kind, world):
    answers = set()
    for seed in range(200):
        story = tell_story(np.random.default_rng(seed), kind, world, num_facts=10)
        assert story == tell_story(np.random.default_rng(seed), kind, world, num_facts=10)
        assert len(story.facts) >= 10 and all(fact.endswith(". ") for fact in story.facts)
        assert answer_from(story.facts, story.question) == story.answer
        answers.add(story.answer)
    assert answers == set(world.places)


def test_the_worlds_share_nothing_and_a_story_needs_facts():
    test, training = (set().union(*vars(world).values()) for world in (TEST_WORLD, TRAINING_WORLD))
    assert not test & training
    with pytest.raises(ValueError, match="num_facts=3: give at least 4"):
        tell_story(np.random.default_rng(0), "qa1", TEST_WORLD, 3)
