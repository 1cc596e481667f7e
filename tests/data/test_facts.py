"""Facts: training and tests share nothing, values stand where spans say, and blocks flag them exactly."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from titans.data import byte_tokenizer
from titans.data.facts import Chat, make_facts
from titans.data.facts_blocks import ANSWER, ANSWER_END, STATED, Episodes, about_json, chat_of
from titans.data.facts_grammar import TEST, TRAINING

WORDS = [first + second for first in ("sal", "mor", "tin", "bel", "gar") for second in "aeiou"] + [
    f"{first}{second}ing"
    for first in ("walk", "rain", "shin", "gleam", "stor")
    for second in "abcdefghijklmnop"
]
FILLER = "The grass is green and the sky is blue. Here we go, there and back again. " * 40
CHAT = Chat("<user>", "</user><model>", "</model>")


def rng(seed=0):
    return np.random.default_rng(seed)


def groups(count=300, seed=0, **options):
    generator = rng(seed)
    return [make_facts(generator, WORDS, 3, **options) for _ in range(count)]


def test_names_and_values_of_tests_are_never_those_of_training():
    trained, tested = (
        [fact for group in groups(held_out=held) for fact in group.facts] for held in (False, True)
    )
    for part in ("name", "value"):
        mine, theirs = ({getattr(fact, part) for fact in facts} - {""} for facts in (trained, tested))
        assert not mine & theirs
        assert min(len(mine), len(theirs)) > 200


@pytest.mark.parametrize("field", TRAINING.__dataclass_fields__)
def test_no_part_of_a_sentence_is_in_both_grammars(field):
    assert not set(getattr(TRAINING, field)) & set(getattr(TEST, field)) - {""}


@pytest.mark.parametrize("chat", [None, CHAT])
@pytest.mark.parametrize("wording", [False, True])
def test_every_sentence_gives_its_value_behind_what_it_belongs_to(chat, wording):
    for group in groups(chat=chat, held_out_wording=wording):
        for fact, statement, question in zip(group.facts, group.statements, group.questions, strict=True):
            for sentence in (statement, question):
                before = sentence.text[: sentence.begin]
                assert sentence.text[sentence.begin : sentence.end] == fact.value
                assert sentence.text[sentence.end] == "."
                # At most the first letter is another at the beginning of a sentence.
                assert fact.name[1:] in before
                assert "{" not in sentence.text
            assert fact.relation[1:] in statement.text


def test_groups_alike_differ_in_names_and_values_only():
    found = groups()
    shares = {kind: count / len(found) for kind, count in Counter(group.kind for group in found).items()}
    assert 0.6 < shares["alike"] < 0.8 and 0.05 < shares["one name"] < 0.15
    for group in found:
        names, relations = ([getattr(fact, part) for fact in group.facts] for part in ("name", "relation"))
        if group.kind == "alike":
            assert len({*names}) == 3 and len({*relations}) == 1
            forms = {
                (sentence.text[: sentence.begin] + sentence.text[sentence.end :])
                .lower()
                .replace(name.lower(), "*", 1)
                for name, sentence in zip(names, group.statements, strict=True)
            }
            assert len(forms) == 1
        elif group.kind == "one name":
            assert len({*names}) == 1 and len({*relations}) == 3


def test_questions_take_many_forms_and_a_chat_closes_its_turns():
    questions = [question for group in groups(chat=CHAT) for question in group.questions]
    chats = [question for question in questions if question.text.startswith(CHAT.before)]
    assert 0.15 < len(chats) / len(questions) < 0.35
    assert all(question.text.endswith(".</model>") for question in chats)
    statements = {s.text[: s.begin].rsplit(" ", 2)[-2] for group in groups() for s in group.statements}
    assert len(statements) > 20


@pytest.mark.parametrize("held", [False, True])
def test_blocks_flag_the_values_and_nothing_else(held):
    tokenizer = byte_tokenizer()
    episodes = Episodes(tokenizer, [FILLER], WORDS, length=600, most=3)
    generator = rng(1)
    for _ in range(20):
        episode = episodes.draw(generator, held_out=held, held_out_wording=held)
        values = [fact.value for fact in episode.group.facts]
        assert episode.asked
        for block, flag, expected in (
            (episode.statements, STATED, values),
            (episode.questions, ANSWER, [values[i] for i in episode.asked]),
        ):
            assert block.ids.shape == block.flags.shape == (600,)
            assert _runs(block, flag) == expected
        ends = np.flatnonzero(episode.questions.flags == ANSWER_END)
        assert len(ends) == len(episode.asked)
        assert {bytes([i]) for i in episode.questions.ids[ends].tolist()} == {b"."}
        assert set(np.unique(episode.statements.flags)) == {0, STATED}
        assert json.loads(about_json([episode]))[0]["facts"][0]["value"] == values[0]


def _runs(block, flag):
    """The texts of the runs of a flag."""
    found, last = [], -2
    for at in np.flatnonzero(block.flags == flag).tolist():
        if at != last + 1:
            found.append(b"")
        found[-1] += bytes([int(block.ids[at])])
        last = at
    return [run.decode() for run in found]


def test_episodes_are_seeded_and_filler_stands_between():
    def drawn(seed):
        return Episodes(byte_tokenizer(), [FILLER], WORDS, length=600).draw(rng(seed))

    assert np.array_equal(drawn(5).statements.ids, drawn(5).statements.ids)
    assert not np.array_equal(drawn(5).statements.ids, drawn(6).statements.ids)
    text = bytes(drawn(5).statements.ids.tolist()).decode()
    assert "grass" in text or "there and back" in text


def test_the_marks_of_a_chat_are_taken_from_the_template_without_its_system_prompt():
    tokenizer = byte_tokenizer()
    assert chat_of(tokenizer) is None
    turns = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]\n{% endfor %}"
    tokenizer.chat_template = turns
    assert chat_of(tokenizer) == Chat("[user]", "[end]\n[assistant]", "[end]\n")
    tokenizer.chat_template = "[system]Be kind.[end]\n" + turns
    assert chat_of(tokenizer) == Chat("[user]", "[end]\n[assistant]", "[end]\n")


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="words has 2 different words: give at least 100"):
        make_facts(rng(), ["one", "two"], 1)
    with pytest.raises(ValueError, match="count=0"):
        make_facts(rng(), WORDS, 0)
    with pytest.raises(ValueError, match="fillers: give a text of at least 1,000"):
        Episodes(byte_tokenizer(), ["short"], WORDS)
    with pytest.raises(ValueError, match="length=20: too short"):
        Episodes(byte_tokenizer(), [FILLER], WORDS, length=20).draw(rng())
    with pytest.raises(ValueError, match="tokenizer is a object"):
        Episodes(object(), [FILLER], WORDS)
