"""Chunks of one token, computed a block at a time: the oracle's answers and gradients, at a chunk's cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from titans.memory import Huber, InnerProblem, MemoryNetwork, MemoryState, MomentumRule, memory_scan
from titans.memory.chunkwise import delta
from titans.memory.chunkwise import scan as chunkwise

from ..tolerances import FLOAT32, FLOAT64, assert_close
from .problems import Problem, answers, assert_same, everything, make_problem
from .test_anchored import Anchored
from .test_conformance import tame

LINEAR = dict(depth=1, norm=False, residual=False, chunk_size=1)

calls = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 2**20),
        batch=st.integers(1, 3),
        heads=st.integers(1, 2),
        time=st.integers(0, 20),
        head_dim=st.integers(1, 4),
        key_dim=st.one_of(st.none(), st.integers(1, 5)),
        normalize_step=st.booleans(),
        mask=st.sampled_from(["none", "random", "rows"]),
        reset=st.sampled_from(["none", "random", "last"]),
        initial_momentum=st.booleans(),
        base=st.booleans(),
        position=st.sampled_from(["zero", "same", "apart"]),
    )
)


def in_blocks(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(chunkwise, "block_width", lambda net: width)


def without_momentum(problem: Problem) -> Problem:
    gates = torch.where(problem.mask[..., None, None], 0.0, torch.nan)
    return problem.change(momentum=gates.expand_as(problem.leaves["momentum"]).double())


@settings(max_examples=40)
@given(
    call=calls,
    width=st.integers(1, 7),
    cuts=st.lists(st.integers(0, 20), max_size=2),
    anchor_apart=st.booleans(),
    read_anchor=st.booleans(),
    momentum=st.booleans(),
)
def test_any_call_in_any_split(call, width, cuts, anchor_apart, read_anchor, momentum):
    problem = make_problem(**LINEAR, **call)
    if anchor_apart:
        # As a state that another chunk size left.
        problem = problem.change(**{"state.anchor.0": problem.leaves["state.weights.0"] - 0.5})
    if read_anchor:
        problem = Anchored(**vars(problem))
    if not momentum:
        problem = without_momentum(problem)
    expected = everything(problem, "reference")
    assume(tame(expected))
    with pytest.MonkeyPatch.context() as patch:
        in_blocks(patch, width)
        cuts = sorted(min(cut, problem.time) for cut in cuts)
        assert_same(everything(problem, "chunkwise", cuts), expected, FLOAT64)


@pytest.mark.parametrize("reset", ["none", "last"])
@pytest.mark.parametrize("mask", ["none", "rows", "ends"])
def test_without_momentum_the_products_with_it_are_left_out(mask, reset, monkeypatch):
    """Neither does a gate of 0 that needs no gradient change the others'; the last write is the momentum."""
    in_blocks(monkeypatch, 4)
    problem = make_problem(
        **LINEAR, time=23, batch=3, mask=mask.replace("ends", "random"), reset=reset, seed=5
    )
    if mask == "ends":
        # A row whose last token lies blocks before the others'.
        problem.flags["mask"][1, 6:] = False
    problem = without_momentum(problem)
    products = []
    monkeypatch.setattr(
        delta,
        "inside_block",
        lambda *x, real=delta.inside_block: products.append(x[3] is not None) or real(*x),
    )

    def found(backend):
        leaves = problem.require_grad()
        leaves.leaves["momentum"].requires_grad_(False)
        reads, state, surprise = leaves.scan(backend)
        names = [name for name, x in leaves.leaves.items() if x.requires_grad]
        total = reads.square().sum() + state.weights[0].sum() + (state.momentum[0] * 3).sum()
        grads = torch.autograd.grad(
            total, [leaves.leaves[name] for name in names], allow_unused=True, materialize_grads=True
        )
        return answers(reads, state, surprise) | dict(zip(names, grads, strict=True)), state.position

    assert_same(found("chunkwise"), found("reference"), FLOAT64)
    assert products and not any(products)


def test_gradcheck(monkeypatch):
    in_blocks(monkeypatch, 3)
    problem = make_problem(
        **LINEAR, batch=1, time=7, heads=1, head_dim=2, key_dim=3, base=True, reset="random",
        normalize_step=True, closed_gates=False,
    )  # fmt: skip
    names, leaves = zip(*problem.require_grad().leaves.items(), strict=True)

    def scan(*leaves):
        reads, state, _ = problem.change(**dict(zip(names, leaves, strict=True))).scan("chunkwise")
        return reads, *state.weights, *state.momentum

    assert torch.autograd.gradcheck(scan, leaves, fast_mode=True)


@pytest.mark.parametrize("width", [1, 5, 32])
def test_a_full_step_replaces_what_a_key_was_given_before(width, monkeypatch):
    """θ = ½ with the gradient's factor 2 is the delta rule at β = 1: a unit key then recalls its last value,
    whatever other keys are repeated in between, and a forget gate of 1 recalls nothing else."""
    in_blocks(monkeypatch, width)
    net = MemoryNetwork(head_dim=3, key_dim=4, depth=1, norm=False, residual=False)
    rng = torch.Generator().manual_seed(0)
    which = torch.randint(4, (1, 40), generator=rng)
    keys = torch.eye(4, dtype=torch.float64)[which].unsqueeze(2)
    values = torch.randn(1, 40, 1, 3, generator=rng, dtype=torch.float64)
    closed, open_, half = (torch.full((1, 40, 1, 1), x, dtype=torch.float64) for x in (0.0, 1.0, 0.5))
    state = MemoryState.initial((torch.randn(1, 1, 3, 4, generator=rng, dtype=torch.float64),))
    last = [(which[0] == i).nonzero().max() for i in range(4)]
    options = dict(chunk_size=1, backend="chunkwise")
    _, after = memory_scan(net, keys, keys, values, closed, closed, half, state, **options)
    assert_close(after.weights[0][0, 0].mT, values[0, last, 0], FLOAT64, "weights")
    # With forgetting, W is what is written alone: −e kᵀ for the last token, and its error is v against 0.
    reads, after = memory_scan(net, keys, keys, values, open_, closed, half, state, **options)
    assert_close(reads[:, 1:], _writes(keys, values, state)[:, 1:], FLOAT64, "reads")


def _writes(keys, values, state):
    """The reads of a memory that forgets everything at every token: (v_t − W_{t−1} k_t) k_tᵀ k_t."""
    weight, reads = state.weights[0][0, 0], []
    for key, value in zip(keys[0, :, 0], values[0, :, 0], strict=True):
        weight = torch.outer(value - weight @ key, key)
        reads.append(weight @ key)
    return torch.stack(reads)[None, :, None]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_float32_follows_float64_through_thousands_of_tokens_with_repeated_keys(momentum):
    problem = make_problem(**LINEAR, time=2000, batch=1, head_dim=8, key_dim=16, normalize_step=True)
    keys = problem.leaves["keys"].clone()
    keys[:, 1::2] = keys[:, :1]
    problem = problem.change(
        keys=keys,
        momentum=torch.full_like(problem.leaves["momentum"], momentum),
        step_size=torch.full_like(problem.leaves["step_size"], 0.9 - 0.8 * momentum),
    )
    single, double = problem.to(torch.float32), problem
    found, expected = (answers(*p.scan("chunkwise")) for p in (single, double))
    for name, value in expected.items():
        assert_close(found[name].double(), value, FLOAT32, name)


@pytest.mark.parametrize(
    ("changes", "is_one"),
    [
        ({}, True),
        (dict(key_dim=7), True),
        (dict(normalize_step=True), True),
        (dict(chunk_size=2), False),
        (dict(depth=2), False),
        (dict(norm=True), False),
        (dict(residual=True), False),
        (dict(row_limit=1.0), False),
        (dict(objective="huber"), False),
    ],
)
def test_only_the_delta_rule_is_computed_so(changes, is_one, monkeypatch):
    ran = []
    real = chunkwise.scan_delta_blocks
    monkeypatch.setattr(chunkwise, "scan_delta_blocks", lambda *x: ran.append(True) or real(*x))
    make_problem(**(LINEAR | changes), time=5).scan("chunkwise")
    assert bool(ran) is is_one


def test_a_rule_that_derives_is_another():
    class Doubled(MomentumRule):
        def end(self, state):
            return replace(state, weights=tuple(2 * w for w in state.weights))

    problem = make_problem(**LINEAR, time=5)
    for inner in (
        InnerProblem(problem.net, rule=Doubled()),
        InnerProblem(problem.net, objective=Huber(0.1)),
    ):
        other = replace(problem, inner=inner)
        assert_same(everything(other, "chunkwise"), everything(other, "reference"), FLOAT64)


@pytest.mark.parametrize("backend", ["native", "auto"])
def test_a_large_matrix_goes_in_blocks_whatever_the_backend_on_a_processor(backend, monkeypatch):
    problem = make_problem(**LINEAR, time=90, batch=1, heads=1, head_dim=32, key_dim=64, normalize_step=True)
    ran = []
    real = chunkwise.scan_delta_blocks
    monkeypatch.setattr(chunkwise, "scan_delta_blocks", lambda *x: ran.append(True) or real(*x))
    found, expected = everything(problem, backend), everything(problem, "reference")
    assert ran
    assert_same(found, expected, FLOAT64)
    # A few tokens, as in generation, do not; their state continues one that blocks have left.
    ran.clear()
    with torch.no_grad():
        whole = answers(*problem.scan("reference"))
        _, state, _ = problem.scan(backend, cut=slice(0, 88))
        assert ran
        ran.clear()
        for t in (88, 89):
            reads, state, surprise = problem.scan(backend, state, slice(t, t + 1))
    assert bool(ran) is False or backend == "auto"
    for name, value in answers(reads, state, surprise).items():
        wanted = whole[name][:, -1:] if name in ("reads", "surprise") else whole[name]
        assert_close(value, wanted, FLOAT64, name)


def test_it_refuses_second_derivatives():
    problem = make_problem(**LINEAR, time=5).require_grad()
    reads, _, _ = problem.scan("chunkwise")
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(reads.sum(), problem.leaves["keys"], create_graph=True)


@pytest.mark.parametrize("options", [{}, dict(mask="random", reset="random", position="apart")])
def test_weights_kept_for_the_backward_grow_with_the_root_of_the_blocks(options, monkeypatch):
    in_blocks(monkeypatch, 4)

    def kept(blocks):
        problem = make_problem(**LINEAR, time=4 * blocks, batch=1, heads=1, key_dim=9, **options)
        problem, shapes = problem.require_grad(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape) or x, lambda x: x):
            problem.scan("chunkwise")
        return sum(shape[-2:] == (3, 9) for shape in shapes)

    assert 0 < kept(144) < 4 * kept(16)
