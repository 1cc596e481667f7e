"""Sessions that generate together get what each would get alone, whoever joins and leaves in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from titans.hf.causal_cache import named_leaves
from titans.stream import Session, feed_together
from titans.stream.decoding import Decoding

from .hf.grafts import LEARNING, RECALLING, small_graft
from .hf.models import random_ids, small_model
from .models import small_causal_lm

# When each joins, how much it has read, and how many tokens it takes.
PLANS = [(0, 3, 6), (0, 9, 2), (2, 14, 9), (3, 27, 4), (8, 1, 3)]


def model_of(kind: str) -> Any:
    if kind == "graft":
        return small_graft("llama", adaptation=LEARNING, association=RECALLING)
    return small_causal_lm(kind).double() if kind in CAUSAL else small_model(kind)


CAUSAL = ("llama", "mistral", "mamba2", "mamba")


def leaves(session: Session) -> list[Any]:
    cache = session.cache
    return (
        list(named_leaves(cache.held).values())
        if hasattr(cache, "held")
        else pytree.tree_leaves(cache.states)
    )


@pytest.mark.parametrize("kind", ["mac", "lmm", "transformer", "graft", *CAUSAL])
def test_sessions_that_generate_together_equal_each_alone(kind: str) -> None:
    model = model_of(kind)
    texts = [random_ids(count, seed=row) for row, (_, count, _) in enumerate(PLANS)]
    alone, together = ([Session(model) for _ in PLANS] for _ in range(2))
    expected = []
    for session, text, (_, _, most) in zip(alone, texts, PLANS, strict=True):
        session.feed(text)
        expected.append(session.generate(max_new_tokens=most, do_sample=False)[0].tolist())
    assert len({tuple(ids) for ids in expected}) == len(PLANS), "too easy: answers must differ"

    if kind in CAUSAL:
        assert together[0].reader.can_read_side_by_side() == (kind != "mamba")
    results = feed_together(together, texts)
    assert [result.tokens for result in results] == [count for _, count, _ in PLANS]
    decoding, found = Decoding(together[0].reader), [[] for _ in PLANS]
    for time in range(12):
        for session, (begin, _, _) in zip(together, PLANS, strict=True):
            if begin == time:
                decoding.join(session)
        if not decoding.sessions:
            continue
        logits, failed = decoding.step()
        assert not failed
        assert logits.shape == (len(decoding.sessions), model.config.vocab_size)
        tokens = logits.argmax(-1).tolist()
        decoding.choose(tokens)
        for session, token in zip(decoding.sessions, tokens, strict=True):
            row = together.index(session)
            found[row].append(token)
            if len(found[row]) == PLANS[row][2]:
                decoding.leave(session)
    assert found == expected and not decoding.sessions
    for mine, other in zip(together, alone, strict=True):
        assert mine.num_tokens == other.num_tokens and mine.recent == other.recent
        # What states hold, not only what they answer.
        for leaf, its in zip(leaves(mine), leaves(other), strict=True):
            torch.testing.assert_close(leaf, its, rtol=0, atol=1e-8 if leaf.dtype == torch.float64 else 1e-5)
        assert torch.equal(
            mine.generate(max_new_tokens=3, do_sample=False),
            other.generate(max_new_tokens=3, do_sample=False),
        )


@pytest.mark.parametrize("kind", ["lmm", "graft"])
def test_an_error_of_one_text_is_its_own(kind: str) -> None:
    model, lengths = model_of(kind), (9, 14, 27)
    weights = model.get_input_embeddings().weight
    broken = len(weights) - 1
    sessions = [Session(model) for _ in lengths]
    for row, (session, length) in enumerate(zip(sessions, lengths, strict=True)):
        session.feed(random_ids(length, seed=row) % broken)
    decoding, found = Decoding(sessions[0].reader), {session: [] for session in sessions}
    expected = [
        session.fork().generate(max_new_tokens=5, do_sample=False)[0].tolist() for session in sessions
    ]
    for session in sessions:
        decoding.join(session)
    before, errors = weights[broken].clone(), []
    with torch.no_grad():
        weights[broken] = torch.nan
    for time in range(5):
        logits, failed = decoding.step()
        errors.append(failed)
        tokens = logits.argmax(-1).tolist()
        if time == 1:
            tokens[1] = broken
        decoding.choose(tokens)
        for session, token in zip(decoding.sessions, tokens, strict=True):
            found[session].append(token)
    with torch.no_grad():
        weights[broken] = before
    assert [len(each) for each in errors] == [0, 0, 1, 0, 0] and "NaN" in str(errors[2][sessions[1]])
    assert decoding.sessions == [sessions[0], sessions[2]]
    assert [found[sessions[0]], found[sessions[2]]] == [expected[0], expected[2]]
    # It has left with the token that was chosen for it, unread, and can be used.
    assert sessions[1].recent[-1] == broken and sessions[1].num_tokens == 14 + 2
    sessions[1].feed([1])


def test_a_member_takes_in_nothing_else() -> None:
    model = small_model("lmm")
    session, empty = Session(model), Session(model)
    session.feed(random_ids(5))
    decoding = Decoding(session.reader)
    decoding.join(session)
    with pytest.raises(RuntimeError, match="stream of generated text is open"):
        session.feed([1])
    with pytest.raises(RuntimeError, match="stream of generated text is open"):
        decoding.join(session)
    with pytest.raises(ValueError, match="no token to start from"):
        decoding.join(empty)
    with pytest.raises(ValueError, match="another model"):
        Decoding(Session(small_model("mac")).reader).join(session)
    decoding.leave(session)
    assert session.feed([1]).tokens == 1 and session.num_tokens == 6
