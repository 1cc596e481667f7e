"""Every fast backend computes the reference's function: reads, state, surprise, gradients, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, event, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

from titans.memory import BACKENDS, OBJECTIVES, UPDATE_RULES, MemoryState
from titans.memory.objectives import num_inputs

from ..tolerances import FLOAT64, assert_close
from .problems import (
    GATES,
    TOKENS,
    VECTORS,
    Problem,
    answers,
    assert_same,
    everything,
    make_problem,
    parts,
    quick_backends,
)

FAST = [name for name in BACKENDS if name != "reference"]

networks = dict(
    head_dim=st.integers(1, 5),
    depth=st.integers(1, 4),
    expansion=st.integers(1, 3),
    key_dim=st.one_of(st.none(), st.integers(1, 7)),
    activation=st.sampled_from(["gelu", "silu", "sin"]),
    residual=st.booleans(),
    norm=st.booleans(),
    normalize_step=st.booleans(),
    row_limit=st.sampled_from([None, 0.7]),
)
calls = st.fixed_dictionaries(
    networks
    | dict(
        seed=st.integers(0, 2**20),
        batch=st.integers(1, 3),
        heads=st.integers(1, 2),
        affine=st.booleans(),
        mask=st.sampled_from(["none", "random", "rows"]),
        reset=st.sampled_from(["none", "random", "last"]),
        initial_momentum=st.booleans(),
        base=st.booleans(),
        position=st.sampled_from(["zero", "same", "apart"]),
        closed_gates=st.booleans(),
        by_row=st.sampled_from([False, False, False, True]),
    )
)
# Seven chunks and more are three groups or more, each of which the backward recomputes.
stretches = st.tuples(st.integers(1, 7), st.integers(0, 13), st.integers(0, 6)).map(
    lambda x: dict(chunk_size=x[0], time=min(40, x[0] * x[1] + x[2]))
)
splits = st.lists(st.integers(0, 40), min_size=1, max_size=6)


# Errors on both sides of the threshold; a power whose third derivative has no bound at an error of 0.
HUBER, LP = {"name": "huber", "delta": 0.5}, {"name": "lp", "p": 2.5}


def tame(found: tuple[dict[str, Tensor], Tensor]) -> bool:
    """No gradient so large that it says a rounding is amplified beyond what 1e-10 allows."""
    return all(x.abs().max() < 1e4 for x in found[0].values() if x.numel())


def within(problem: Problem, cuts: list[int]) -> list[int]:
    return sorted(min(cut, problem.time) for cut in cuts)


def agree(problem: Problem, backend: str) -> None:
    if (reason := problem.refused(backend)) and backend.startswith("native"):
        pytest.skip(reason)
    assert_same(everything(problem, backend), everything(problem, "reference"), FLOAT64)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradient_of_an_objective_is_that_of_its_value(objective):
    """All backends call `gradient`, so that a wrong one is the same in each of them."""
    made = OBJECTIVES.make(objective)
    rng = torch.Generator().manual_seed(0)
    answer, target = torch.randn(2, 64, 5, generator=rng, dtype=torch.float64)
    answer.requires_grad_()
    if count := num_inputs(made):
        logits = torch.randn(64, count, generator=rng, dtype=torch.float64)
        target = torch.cat([target, made.from_logits(logits)], -1)  # type: ignore[attr-defined]
    (expected,) = torch.autograd.grad(made.value(answer, target).sum(), answer)
    with torch.no_grad():
        assert_close(made.gradient(answer, target), expected, FLOAT64, f"objective {objective!r}: gradient")


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_any_call_and_split(rule):
    """Reads, state, surprise and gradients, the latter also back through a chain of calls.

    The oracle, which takes most of the time, runs once for all backends. The compiled ones run the momentum
    rule, and so most examples have that.
    """

    @settings(max_examples=40 if rule == "momentum" else 4)
    @given(
        call=calls,
        stretch=stretches,
        objective=st.sampled_from([*sorted(OBJECTIVES), HUBER, LP]),
        cuts=st.one_of(st.just([]), splits),
    )
    def check(call, stretch, objective, cuts):
        # A row of one number that is rescaled has a gradient of exactly 0, and what is found is rounding.
        assume(call["head_dim"] > 1 or call["row_limit"] is None)
        event(f"three groups or more: {stretch['time'] // stretch['chunk_size'] >= 7}")
        window = {"window": 3} if UPDATE_RULES[rule].window > 1 else {}
        # What such an objective takes for each token is not carried from window to window.
        assume(not (window and num_inputs(OBJECTIVES.make(objective))))
        problem = make_problem(**call, **stretch, objective=objective, rule=rule, **window)
        expected = everything(problem, "reference")
        assume(tame(expected))
        for backend in quick_backends():
            if reason := problem.refused(backend):
                event(f"{backend} refuses: {reason}")
                assert backend.startswith("native") and "knows" in reason
                continue
            note(backend)
            assert_same(everything(problem, backend, within(problem, cuts)), expected, FLOAT64)

    check()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_a_beginning_and_a_chunk_that_writes_nothing_have_finite_gradients(rule, objective):
    """Random calls carry random numbers in `extra`, and are left out where a gradient is NaN; this begins as
    a text does, where a root or a quotient of what the rule carries, or of what a chunk has changed, may have
    none."""
    window = {"window": 3} if UPDATE_RULES[rule].window > 1 else {}
    if window and num_inputs(OBJECTIVES.make(objective)):
        pytest.skip("what such an objective takes for each token is not carried from window to window")
    problem = make_problem(
        seed=3, batch=3, time=7, chunk_size=3, rule=rule, objective=objective, base=True, normalize_step=True,
        row_limit=0.7, **window,
    )  # fmt: skip
    if not UPDATE_RULES[rule].needs_first_weights:  # The weights are differences from those.
        zeros = {name: torch.zeros_like(x) for name, x in problem.leaves.items() if name.startswith("state.")}
        problem = problem.change(**zeros)
    fresh = problem.inner.rule.fresh_extra(tuple(problem.state.weights))
    # The second row's tokens are zeros, and the gates of the third are closed in its first chunk.
    tokens = {name: problem.leaves[name].clone() for name in TOKENS}
    for name in VECTORS:
        tokens[name][1] = 0
    for name in GATES:
        tokens[name][2, :3] = 0
    problem = problem.change(**tokens, **{f"state.extra.{i}": x.detach() for i, x in enumerate(fresh)})
    expected = everything(problem, "reference")
    assert not [name for name, x in expected[0].items() if not x.isfinite().all()], (
        f"numbers that are not finite: rule {rule!r}, objective {objective!r}"
    )
    assert_same(everything(problem, "chunkwise"), expected, FLOAT64)


CORNERS = {
    "whole chunks, many groups": dict(time=39, chunk_size=3),
    "a token a chunk": dict(time=20, chunk_size=1),
    "one chunk longer than the stretch": dict(time=5, chunk_size=64),
    "one token at the start": dict(time=1),
    "one token inside a chunk": dict(time=1, position="same", seed=4),
    "no token": dict(time=0, mask="random", reset="last", position="apart"),
    "no row": dict(batch=0, mask="random", reset="random"),
    "head, body and tail": dict(time=31, chunk_size=5, position="same", seed=3),
    "rows apart, many groups": dict(batch=3, time=38, chunk_size=3, position="apart"),
    "a row without a real token": dict(mask="rows", position="apart"),
    "documents packed, many groups": dict(time=38, chunk_size=3, reset="last", mask="random"),
    "documents that start with momentum": dict(reset="last", mask="random", initial_momentum=True),
    "deep, every option": dict(
        depth=4, normalize_step=True, row_limit=0.7, reset="random", mask="random", position="apart"
    ),
    "linear and plain": dict(depth=1, residual=False, norm=False, time=40, chunk_size=4),
    "rows kept short": dict(norm=False, row_limit=0.7, activation="silu", time=30),
    "offsets": dict(base=True, norm=False, residual=False, row_limit=0.8, time=30, normalize_step=True),
    "offsets, every option": dict(
        base=True,
        depth=3,
        row_limit=0.5,
        normalize_step=True,
        reset="last",
        mask="random",
        position="apart",
        time=38,
        initial_momentum=True,
    ),
    "features of one number": dict(head_dim=1, expansion=1, depth=3, activation="silu"),
    "features of a key": dict(key_dim=7, depth=1, norm=False, normalize_step=True, base=True, row_limit=0.7),
    "features of a key, two layers": dict(key_dim=2, activation="sin", normalize_step=True, base=True),
    "features of a key, ragged": dict(key_dim=5, depth=1, mask="random", reset="random", position="apart"),
    "sin": dict(activation="sin", depth=3, normalize_step=True),
    "rows that forget at their own pace": dict(
        by_row=True, base=True, mask="random", reset="last", position="apart", normalize_step=True, time=31
    ),
    "one matrix whose rows forget, a token a chunk": dict(
        by_row=True, depth=1, residual=False, norm=False, chunk_size=1, time=9
    ),
    "norm without gain": dict(affine=False, normalize_step=True),
    "outliers": dict(objective=HUBER, batch=1, heads=1, time=9, normalize_step=True),
    "errors to a power": dict(objective=LP, batch=1, heads=1, time=9, normalize_step=True, norm=False),
    "thresholds of tokens": dict(objective="adaptive_huber", batch=1, heads=1, time=9, normalize_step=True),
    "errors to a power, with a norm": dict(objective=LP, batch=1, heads=1, time=9, normalize_step=True),
}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("corner", CORNERS)
def test_corner(backend, corner):
    call = CORNERS[corner]
    if backend == "triton" and call.get("chunk_size", 4) <= 4:
        # Under the interpreter a chunk takes a tenth of a second; after six there is nothing new to a kernel.
        call = call | dict(time=min(call.get("time", 17), 6 * call.get("chunk_size", 4) + 1))
    agree(make_problem(**call), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("objective", [HUBER, LP, {"name": "lp", "p": 4}])
def test_errors_that_tie_share_the_gradient_of_the_curvature(backend, objective):
    """An empty memory whose values are ±1, on some tokens 0: an error of 0 has no slope at all."""
    problem = make_problem(
        time=12, chunk_size=6, depth=1, norm=False, residual=False, normalize_step=True, objective=objective
    )
    values = problem.leaves["values"].sign()
    values[:, 2::5] = 0
    problem = problem.change(values=values, **{name: 0 * x for name, x in parts(problem.state).items()})
    agree(problem, backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("gates", [("forget",), ("momentum",), ("forget", "momentum"), GATES])
def test_gates_closed_and_open_throughout(backend, gates, value, depth):
    problem = make_problem(depth=depth, time=22, chunk_size=3, norm=False, mask="random")
    extreme = {name: torch.full_like(problem.leaves[name], value) for name in gates}
    if value and "step_size" in gates:
        extreme["step_size"] *= 0.03
    agree(problem.change(**extreme), backend)


@pytest.mark.parametrize("backend", FAST)
def test_masked_inputs_reach_nothing(backend):
    """NaN in every masked slot changes nothing, and its gradient is exactly 0."""
    problem = make_problem(time=23, mask="random", reset="random", position="apart")
    hidden = ~problem.mask
    assert hidden.any() and problem.leaves["keys"][hidden].isnan().all()
    found, _ = everything(problem, backend)
    for name in TOKENS:
        assert (found[f"gradient of {name}"][hidden] == 0).all()
    assert (found["reads"][hidden] == 0).all() and (found["surprise"][hidden] == 0).all()
    zeros = {name: problem.leaves[name].nan_to_num() for name in TOKENS}
    for name, value in everything(problem.change(**zeros), backend)[0].items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("ragged", [False, True])
def test_gradcheck(backend, depth, ragged):
    """Against finite differences, from an open chunk, where weights and anchor are two tensors.

    In random directions: the other tests compare every number of a gradient with the oracle's.
    """
    flags = dict(mask="random", reset="random", initial_momentum=True) if ragged else {}
    problem = make_problem(
        batch=1,
        time=7,
        heads=1,
        head_dim=3,
        depth=depth,
        expansion=1,
        chunk_size=3,
        closed_gates=False,
        **flags,
    )
    anchor = make_problem(seed=1, batch=1, heads=1, head_dim=3, depth=depth, expansion=1)
    leaves = {name: problem.leaves[name].nan_to_num(0.5) for name in TOKENS}
    leaves |= {f"state.anchor.{layer}": anchor.leaves[f"state.anchor.{layer}"] for layer in range(depth)}
    problem = replace(problem.change(**leaves), position=torch.tensor([4])).require_grad()

    def function(*leaves):
        changed = problem.change(**dict(zip(problem.leaves, leaves, strict=True)))
        reads, state, _ = changed.scan(backend)
        return reads, *parts(state).values()

    assert torch.autograd.gradcheck(function, tuple(problem.leaves.values()), fast_mode=True)
    reads, _, _ = problem.scan(backend)
    for part in ("weights", "anchor"):
        for grad in torch.autograd.grad(reads.sum(), problem.layers(f"state.{part}"), retain_graph=True):
            assert grad.abs().max() > 1e-6


@pytest.mark.parametrize("backend", FAST)
def test_backward_under_autocast_is_the_gradient_of_what_went_forward(backend):
    """The recomputation must not run in bfloat16 because the caller goes backward under autocast."""
    problem = make_problem(head_dim=16, time=20).to(torch.float32).require_grad()

    def gradient(enabled):
        reads, _, _ = problem.scan(backend)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(reads.square().sum(), problem.leaves["keys"])[0]

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("backend", FAST)
def test_second_derivatives_are_refused_rather_than_wrong(backend):
    problem = make_problem(time=5).require_grad()
    reads, _, _ = problem.scan(backend)
    with pytest.raises(RuntimeError, match=r"differentiable once.*create_graph=True.*use 'reference'"):
        torch.autograd.grad(reads.sum(), problem.leaves["keys"], create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_autograd_the_values_are_the_same(backend):
    problem = make_problem(time=25, reset="random", mask="random", position="apart")
    recording = answers(*problem.require_grad().scan(backend))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            reads, state, surprise = problem.scan(backend)
        assert isinstance(state, MemoryState)
        for name, value in answers(reads, state, surprise).items():
            assert torch.equal(value, recording[name]), name
