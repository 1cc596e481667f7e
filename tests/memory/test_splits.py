"""A stretch read in any number of calls is the stretch read in one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings

from titans.memory import BACKENDS, MemoryState

from ..tolerances import FLOAT64, assert_close
from .problems import answers, assert_same, everything, make_problem, parts
from .test_conformance import calls, splits, stretches, tame, within


@settings(max_examples=10)
@given(call=calls, stretch=stretches, cuts=splits)
def test_any_split_of_the_oracle(call, stretch, cuts):
    """Reads, state, surprise, and the gradients that flow back through the chain of calls.

    Fast backends are compared with the oracle however a call is split: test_conformance.py.
    """
    problem = make_problem(**call, **stretch)
    whole = everything(problem, "reference")
    assume(tame(whole))
    assert_same(everything(problem, "reference", within(problem, cuts)), whole, FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, dict(mask="random", reset="random", position="apart", row_limit=0.7)]
)
def test_token_by_token(backend, options):
    problem = make_problem(time=11, **options)
    cuts = range(1, problem.time)
    assert_same(everything(problem, backend, cuts), everything(problem, backend), FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_limit", [None, 0.7])
def test_between_chunks_the_anchor_is_the_weights(backend, row_limit):
    problem = make_problem(
        batch=3, time=30, mask="random", reset="random", position="apart", row_limit=row_limit
    )
    state, seen = problem.state, 0
    for t in range(problem.time):
        _, state, _ = problem.scan(backend, state, slice(t, t + 1))
        closed = state.position % problem.chunk_size == 0
        seen += closed.sum().item()
        for weight, anchor in zip(state.weights, state.anchor, strict=True):
            same = (weight == anchor).flatten(1).all(1)
            assert same[closed].all() and not same[~closed].any()
    assert 10 < seen < 80


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_limit", [None, 0.7])
def test_a_masked_call_changes_no_bit(backend, row_limit):
    """Not even by momentum, which moves the weights when every gate is 0."""
    problem = make_problem(position="apart", seed=2, row_limit=row_limit)
    nothing = torch.zeros_like(problem.mask)
    reads, state, surprise = problem.scan(backend, mask=nothing)
    assert (reads == 0).all() and (surprise == 0).all()
    assert torch.equal(state.position, problem.position)
    for name, leaf in parts(state).items():
        assert torch.equal(leaf, problem.leaves[name]), name
    # Nor a row that sits out while the others read.
    nothing[1] = True
    _, state, _ = problem.scan(backend, mask=nothing)
    for name, leaf in parts(state).items():
        assert torch.equal(leaf[0], problem.leaves[name][0]), name
    assert not torch.equal(state.weights[0][1], problem.state.weights[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reset_starts_the_row_afresh(backend):
    """A packed row is its documents, each read alone from the initial weights."""
    problem = make_problem(time=20, reset="random", position="apart")
    begin = torch.zeros_like(problem.mask)
    begin[:, 7], begin[:, 16] = True, True
    packed = answers(*problem.scan(backend, reset=begin))
    first = begin[:, :13].clone()
    first[:, 0], first[:, 7] = True, False
    for document in (slice(7, 16), slice(16, 20)):
        flags = first[:, : document.stop - document.start]
        alone = answers(*problem.scan(backend, cut=document, reset=flags))
        assert_same(
            ({"reads": packed["reads"][:, document]}, problem.position),
            ({"reads": alone["reads"]}, problem.position),
            FLOAT64,
        )
    alone.pop("reads"), alone.pop("surprise")
    assert_same(({k: packed[k] for k in alone}, problem.position), (alone, problem.position), FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [dict(), dict(depth=3, norm=False, base=True, row_limit=0.7)])
def test_decoding(backend, options):
    """One token a call without autograd, at a width of whole vectors, which has a path of its own."""
    problem = make_problem(
        batch=2, time=9, head_dim=16, expansion=1, chunk_size=4, normalize_step=True, **options
    )
    reads, expected, _ = problem.scan("reference")
    state, found = problem.state, []
    with torch.no_grad():
        for t in range(problem.time):
            read, state, _ = problem.scan(backend, state, slice(t, t + 1))
            found.append(read)
            if backend not in ("reference", "triton") and (t + 1) % 4 == 0:
                # Nothing is held twice. (Of the kernel for tokens the device alone knows where a chunk ends.)
                assert state.is_shared
    assert_close(torch.cat(found, 1), reads, FLOAT64, "reads")
    for name, leaf in parts(state).items():
        assert_close(leaf, parts(expected)[name], FLOAT64, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_anchor_that_is_the_weights_in_one_layer_only(backend):
    problem = make_problem(time=6, position="same", seed=4)
    state = problem.state
    anchor = (state.weights[0], 0.5 * state.weights[1])
    state = MemoryState(state.weights, state.momentum, anchor, state.position)
    for found, expected in zip(
        problem.scan(backend, state)[::2], problem.scan("reference", state)[::2], strict=True
    ):
        assert_close(found, expected, FLOAT64, backend)
