"""Needles: what training says and what a test hides share nothing, and every question can be answered."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from titans.data.babi import TEST_WORLD
from titans.data.needles import (
    FILLER,
    TASKS,
    digits,
    make_needles,
    pseudo_word,
    random_uuid,
    state_facts,
)

TEXT = (FILLER * 200).encode()


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("draw", [pseudo_word, random_uuid, digits(5)])
def test_training_and_test_draw_from_halves_that_share_nothing(draw):
    generator = rng()
    trained = {draw(generator, False) for _ in range(3000)}
    tested = {draw(generator, True) for _ in range(1000)}
    assert not trained & tested
    assert len(tested) > 500


def test_training_uses_no_sentence_and_no_noun_of_a_test():
    text = state_facts(TEXT, rng(), 50, farthest=64).text.decode().lower()
    for task in TASKS.values():
        if not task.is_story:
            wording = task.source[0]
            for sentence in (wording.statement, wording.question):
                assert sentence.split("{")[0].strip().lower() not in text
    assert not set(re.findall(r"[a-z]+", text)) & {
        "magic",
        "special",
        "pass",
        "key",
        "number",
        "word",
        "uuid",
        *TEST_WORLD.places,
        *TEST_WORLD.things,
    }


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if not task.is_story])
def test_a_question_ends_as_its_statement_goes_on(task):
    needles = make_needles(TASKS[task], rng(3))
    (statement,), (question,), (answer,) = needles.statements, needles.questions, needles.answers
    cue = question[-8:]
    assert statement[statement.index(cue) + len(cue) :].startswith(answer)
    assert needles == make_needles(TASKS[task], rng(3)) != make_needles(TASKS[task], rng(4))


def test_several_names_values_and_questions():
    needles = make_needles(TASKS["number"], rng(), num_keys=3, num_values=2, num_questions=2)
    assert len(needles.statements) == 6 and len(needles.questions) == len(needles.answers) == 2
    for question, answer in zip(needles.questions, needles.answers, strict=True):
        name = question.split(" is: ")[0].split()[-1]
        stated = [s.split(" is: ")[1].rstrip(". ") for s in needles.statements if f" {name} is" in s]
        assert answer == ", ".join(stated) and len(stated) == 2
    with pytest.raises(ValueError, match="num_questions=4: give at most num_keys=3"):
        make_needles(TASKS["number"], rng(), num_keys=3, num_questions=4)
    with pytest.raises(ValueError, match="this task has no names"):
        make_needles(TASKS["passkey"], rng(), num_keys=2)


def test_facts_are_stated_before_they_are_asked_for_and_the_text_is_kept():
    found, places, _ = state_facts(TEXT, rng(1), 200, farthest=200)
    assert (found, places) == state_facts(TEXT, rng(1), 200, farthest=200)[:2]
    new = found.decode()
    # Every answer was stated before, and a full stop follows it.
    assert all(new[begin:end] in new[:begin] and new[end - 1 : end + 1] == ". " for begin, end in places)
    words = iter(new.split())
    assert all(word in words for word in TEXT.decode().split()), "the text is not all there, in order"
    assert len(places) > 150 and 0.5 * len(TEXT) < len(new) - len(TEXT) < 1.5 * len(TEXT)


def test_facts_alike_differ_in_name_and_value_alone():
    new = state_facts(TEXT, rng(2), 400, farthest=300, alike=1.0)
    stated = [new.text[begin:end].decode() for begin, end in new.statements]
    # Without made-up words and numbers, which are the names and the values, the sentences are the same.
    frames = [
        re.sub(r"\b([b-z][aeiou])+\b|[0-9a-f-]{36}|\d+", "_", sentence, flags=re.I) for sentence in stated
    ]
    groups = [len(list(group)) for frame, group in itertools.groupby(frames) if "_" in frame]
    assert 1 < max(groups) <= 5 and sum(count > 1 for count in groups) > 10
    assert len(set(stated)) == len(stated)
    alone = state_facts(TEXT, rng(2), 400, farthest=300)
    assert len(new.statements) > 1.3 * len(alone.statements)
    for begin, end in new.answers:
        assert new.text[begin:end] in new.text[:begin]
