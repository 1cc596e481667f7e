from __future__ import annotations

import numpy as np
import pytest

from titans.baselines import InterpolatedNgram


def test_a_markov_source_costs_its_entropy() -> None:
    generator = np.random.default_rng(0)
    transition = np.array([[0.9, 0.1, 0.0], [0.0, 0.5, 0.5], [0.3, 0.3, 0.4]])
    stationary = np.linalg.matrix_power(transition, 200)[0]
    safe = np.where(transition > 0, transition, 1)
    entropy = -(stationary[:, None] * transition * np.log2(safe)).sum()
    states = [0]
    for uniform in generator.random(60_000):
        states.append(int(np.searchsorted(transition[states[-1]].cumsum(), uniform)))
    text = np.array(states, dtype=np.uint8)
    train, held_out = text[:40_000], text[40_000:]
    assert InterpolatedNgram(order=3).fit(train).bits_per_token(held_out) == pytest.approx(entropy, rel=0.02)
    unigram = -(stationary * np.log2(stationary)).sum()
    assert InterpolatedNgram(order=1).fit(train).bits_per_token(held_out) == pytest.approx(unigram, rel=0.02)


def test_probabilities_sum_to_one_after_seen_and_unseen_contexts() -> None:
    model = InterpolatedNgram(order=3, vocab_size=5).fit([np.array([0, 1, 2, 0, 1, 3, 0]), np.array([1, 1])])
    for context in ([0, 1], [1, 1], [4, 0], [4, 4], [2]):
        bits = [model.token_bits(np.array([*context, token]))[-1] for token in range(5)]
        assert (2.0 ** -np.array(bits)).sum() == pytest.approx(1)


def test_witten_bell_counts() -> None:
    # After 0 came 1 twice and 2 once: P(1 | 0) = (2 + 2 P(1)) / (3 + 2), and P(1) = (2 + 3/4) / (6 + 3).
    model = InterpolatedNgram(order=2, vocab_size=4).fit(np.array([0, 1, 0, 1, 0, 2]))
    expected = (2 + 2 * (2 + 3 / 4) / (6 + 3)) / (3 + 2)
    assert 2.0 ** -model.token_bits(np.array([0, 1]))[1] == pytest.approx(expected)


def test_no_ngram_spans_two_documents() -> None:
    apart = InterpolatedNgram(order=2, vocab_size=4).fit([np.array([0, 1]), np.array([2, 3])])
    joined = InterpolatedNgram(order=2, vocab_size=4).fit(np.array([0, 1, 2, 3]))
    assert joined.token_bits(np.array([1, 2]))[1] < apart.token_bits(np.array([1, 2]))[1]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="order=8 with vocab_size=256"):
        InterpolatedNgram(order=8)
    with pytest.raises(ValueError, match="call fit first"):
        InterpolatedNgram().bits_per_token(np.array([1, 2]))
    with pytest.raises(ValueError, match=r"token ids outside 0\.\.3"):
        InterpolatedNgram(vocab_size=4).fit(np.array([4]))
    with pytest.raises(ValueError, match="nothing to predict"):
        InterpolatedNgram().fit(np.array([1])).bits_per_token(np.array([1]))
